//! The table of all variables: names, defaults and help, in the order in which reports and `.env.example` show them.

use Standing::{Active, NoEffect};

/// Whether a variable does something.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Standing {
    Active,
    /// Accepted because the guide or older files have it.
    NoEffect {
        /// Why it changes nothing.
        why: &'static str,
        /// The boolean value that says what is so anyhow, and needs no warning.
        harmless: Option<bool>,
    },
}

/// Another name of a variable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Alias {
    /// Read before the variable's own name, as the reference does.
    First(&'static str),
    /// Read if the variable's own name is not set, with a warning.
    Misspelt(&'static str),
}

impl Alias {
    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::First(name) | Self::Misspelt(name) => name,
        }
    }
}

/// One variable.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Variable {
    pub name: &'static str,
    /// Value that holds when the variable is unset or blank, as one would write it; empty if there is none.
    pub default: &'static str,
    /// What no value means, for variables without a default.
    pub unset: &'static str,
    pub help: &'static str,
    pub secret: bool,
    pub standing: Standing,
    pub aliases: &'static [Alias],
}

const fn with_default(name: &'static str, default: &'static str, help: &'static str) -> Variable {
    Variable { name, default, unset: "", help, secret: false, standing: Active, aliases: &[] }
}

const fn optional(name: &'static str, unset: &'static str, help: &'static str) -> Variable {
    Variable { name, default: "", unset, help, secret: false, standing: Active, aliases: &[] }
}

const fn secret(name: &'static str, help: &'static str) -> Variable {
    Variable { secret: true, ..optional(name, "unset", help) }
}

const fn no_effect(name: &'static str, why: &'static str) -> Variable {
    Variable { standing: NoEffect { why, harmless: None }, ..optional(name, "unset", why) }
}

const fn no_effect_unless(name: &'static str, harmless: bool, why: &'static str) -> Variable {
    Variable { standing: NoEffect { why, harmless: Some(harmless) }, ..optional(name, "unset", why) }
}

/// Variables that belong together.
#[derive(Debug, Clone, Copy)]
pub struct Section {
    pub title: &'static str,
    pub variables: &'static [Variable],
}

/// All variables.
pub const SECTIONS: &[Section] = &[
    Section {
        title: "Network and subnet",
        variables: &[
            with_default("BT_NETWORK", "finney", "Network: finney, test, local, archive or custom."),
            optional(
                "BT_CHAIN_ENDPOINT",
                "the network's own node",
                "WebSocket URL of a node; several, separated by commas, are tried in turn. Wins over BT_NETWORK and is \
                 required with BT_NETWORK=custom.",
            ),
            Variable {
                aliases: &[Alias::First("BT_NETUID")],
                ..with_default("NETUID", "81", "Id of the subnet. BT_NETUID is read first.")
            },
        ],
    },
    Section {
        title: "Wallet",
        variables: &[
            with_default("BT_WALLET_COLD", "default", "Name of the wallet (coldkey)."),
            with_default("BT_WALLET_HOT", "default", "Name of the hotkey that signs rollouts and uploads."),
            with_default("BT_WALLET_PATH", "~/.bittensor/wallets", "Folder of the wallets."),
            no_effect("BT_WALLET_NAME", "has no effect: BT_WALLET_COLD names the wallet"),
            no_effect("BT_WALLET_HOTKEY", "has no effect: BT_WALLET_HOT names the hotkey"),
        ],
    },
    Section {
        title: "Object storage (R2 or S3)",
        variables: &[
            optional("R2_ACCOUNT_ID", "unset", "Account id. Required for mining on a network."),
            optional("R2_BUCKET_ID", "unset", "Bucket; named like the account. Required for mining on a network."),
            secret("R2_READ_ACCESS_KEY_ID", "Key that validators read with; it is committed on chain."),
            secret("R2_READ_SECRET_ACCESS_KEY", "Secret of that key; it is committed on chain."),
            secret("R2_WRITE_ACCESS_KEY_ID", "Key for uploads; it stays on this machine."),
            secret("R2_WRITE_SECRET_ACCESS_KEY", "Secret of that key; it stays on this machine."),
            optional(
                "R2_ENDPOINT_URL",
                "https://<account id>.r2.cloudflarestorage.com",
                "Another S3 endpoint; also used for the trainer's bucket.",
            ),
            with_default("R2_REGION", "us-east-1", "Region for signatures."),
            no_effect_unless("R2_FORCE_PATH_STYLE", true, "has no effect: requests always use path style"),
            with_default("UPLOAD_TIMEOUT", "90", "Longest attempt to upload a window file, in seconds."),
        ],
    },
    Section {
        title: "Generation server",
        variables: &[
            with_default("GRAIL_PIPELINE_BACKEND", "sglang", "Generation server: sglang, vllm or builtin (CPU)."),
            Variable {
                aliases: &[Alias::Misspelt("GRAIL_PIPELINE_VLLM_GPU_ID")],
                ..with_default(
                    "GRAIL_PIPELINE_VLLM_GPU",
                    "0",
                    "First GPU of the generation server, counted within CUDA_VISIBLE_DEVICES.",
                )
            },
            with_default(
                "GRAIL_PIPELINE_VLLM_TP",
                "1",
                "GPUs of the generation server (tensor parallelism): VLLM_GPU and those after it.",
            ),
            with_default("GRAIL_PIPELINE_GPU_MEM_UTIL", "0.90", "Share of GPU memory for the generation server."),
            with_default(
                "GRAIL_PIPELINE_MAX_MODEL_LEN",
                "12288",
                "Context length in tokens. Prompts that leave no room for max_tokens are skipped, never shortened.",
            ),
            optional("GRAIL_PIPELINE_MAX_NUM_SEQS", "the server's own", "Sequences that the server runs at once."),
            optional(
                "GRAIL_PIPELINE_MAX_CONCURRENT",
                "automatic: 16 for every open group; 64 with --local",
                "Requests in flight.",
            ),
            optional(
                "GRAIL_PIPELINE_GROUPS_PER_BATCH",
                "automatic",
                "Most groups in generation at once; 1 is the guide's baseline, 24 to 96 are usual on large hosts.",
            ),
            with_default(
                "GRAIL_PIPELINE_SERVER_TIMEOUT",
                "300",
                "Longest start, request or weight update, in seconds.",
            ),
            with_default(
                "GRAIL_PIPELINE_DISABLE_CUDA_GRAPH",
                "false",
                "Switch CUDA graphs of the generation server off altogether.",
            ),
            optional(
                "GRAIL_PIPELINE_SYMLINK_DIR",
                "beside the checkpoints",
                "Folder of the link through which vLLM reloads weights.",
            ),
            optional("GRAIL_VLLM_PYTHON", "python3 on PATH", "Python interpreter that has vLLM."),
            optional("GRAIL_TRAIN_MODEL_ID", "unset", "Tokenizer for vLLM if the checkpoint names no model."),
            no_effect("GRAIL_PIPELINE_ENABLED", "has no effect: the pipeline is the only way to mine"),
            no_effect(
                "GRAIL_GENERATION_BATCH_SIZE",
                "has no effect: GRAIL_PIPELINE_GROUPS_PER_BATCH bounds the groups in generation",
            ),
            no_effect("GRAIL_INFERENCE_BACKEND", "has no effect on a miner: GRAIL_PIPELINE_BACKEND chooses the server"),
        ],
    },
    Section {
        title: "Proof workers",
        variables: &[
            Variable {
                aliases: &[Alias::Misspelt("GRAIL_PIPELINE_PROOF_GPU_ID")],
                ..with_default(
                    "GRAIL_PIPELINE_PROOF_GPU",
                    "1",
                    "GPU of the only proof worker, counted within CUDA_VISIBLE_DEVICES. Ignored if \
                     GRAIL_PIPELINE_PROOF_GPU_IDS is set.",
                )
            },
            optional(
                "GRAIL_PIPELINE_PROOF_GPU_IDS",
                "one worker on GRAIL_PIPELINE_PROOF_GPU",
                "GPUs of the proof workers, one worker each, for instance 4,5,6,7.",
            ),
            no_effect_unless(
                "GRAIL_PIPELINE_PROOF_SUBPROCESS",
                true,
                "has no effect: proof workers are always processes",
            ),
            no_effect_unless(
                "GRAIL_PIPELINE_PROOF_FLASH_ATTN",
                false,
                "has no effect: the attention of proofs always matches the validator's",
            ),
            with_default("GRAIL_PROOF_WORKERS", "2", "Proof workers on the CPU, for --local."),
            optional(
                "GRAIL_LIBTORCH_DIR",
                "the torch of python3 on PATH, if it has one",
                "Folder with libtorch_cuda.so, for proofs on a GPU.",
            ),
            with_default(
                "GRAIL_RELOAD_SHADOW",
                "auto",
                "Second copy of the weights for a change of checkpoint: auto, where memory allows it, always or never.",
            ),
            with_default(
                "GRAIL_PROOF_KERNELS",
                "own",
                "What computes proofs on a GPU: own, our kernels where they can be had, or off, libtorch's operations only.",
            ),
            with_default(
                "GRAIL_WORKER_START_TIMEOUT",
                "180",
                "How long a worker may take to load its model, in seconds; a slower one is started anew.",
            ),
            with_default(
                "GRAIL_WORKER_PROVE_TIMEOUT",
                "600",
                "How long a worker may take to prove a group, in seconds; a slower one is replaced.",
            ),
            with_default(
                "GRAIL_HEARTBEAT_INTERVAL",
                "5",
                "Pause between two signs of life that a child process is asked for, in seconds.",
            ),
            with_default(
                "GRAIL_HEARTBEAT_TIMEOUT",
                "30",
                "Seconds without a sign of life after which a worker, a launcher or a generation server is replaced.",
            ),
            no_effect("KERNEL_EVAL_GPU_IDS", "has no effect: no environment of this version evaluates on a GPU"),
        ],
    },
    Section {
        title: "Windows",
        variables: &[
            with_default(
                "GRAIL_MINER_SAFETY_BLOCKS",
                "3",
                "Blocks before the end of a window that no new group may reach into.",
            ),
            with_default(
                "GRAIL_MAX_GROUPS_PER_WINDOW",
                "313",
                "Groups after which a window is full: 5,000 rollouts, above which nothing is scored. With --local it is 24 \
                 unless it is set.",
            ),
            with_default(
                "GRAIL_MAX_FILE_MIB",
                "330",
                "Estimated size at which a window file is full, in MiB; validators refuse more than 350.",
            ),
            with_default(
                "GRAIL_SHUTDOWN_TIMEOUT",
                "120",
                "How long the groups under way may take after the first SIGTERM, SIGINT or SIGHUP, in seconds; then what is \
                 spooled is sealed and uploaded.",
            ),
        ],
    },
    Section {
        title: "Folders",
        variables: &[
            with_default(
                "GRAIL_CACHE_DIR",
                "~/.cache/grail",
                "Checkpoints of a network. With --local they lie in the state folder; rows of data sets lie in the hub's \
                 own cache (HF_HOME).",
            ),
            optional(
                "GRAIL_STATE_DIR",
                "$XDG_STATE_HOME/grail-supervisor or ~/.local/state/grail-supervisor",
                "Spool, journal and sealed window files.",
            ),
            optional(
                "GRAIL_RUNTIME_DIR",
                "$XDG_RUNTIME_DIR/grail-supervisor or run in the state folder",
                "Sockets of the child processes.",
            ),
            with_default(
                "GRAIL_KEEP_WINDOWS_DAYS",
                "7",
                "Days after which the spool, the file and the randomness of a window that is over are removed.",
            ),
            with_default(
                "GRAIL_KEEP_CHECKPOINTS",
                "4",
                "Checkpoints that the cache keeps, those in use among them, which always stay.",
            ),
            with_default(
                "GRAIL_KEEP_CHECKPOINTS_GIB",
                "0",
                "Size above which the cache drops old checkpoints; 0 = none.",
            ),
            with_default(
                "GRAIL_KEEP_CHECKPOINTS_DAYS",
                "7",
                "Days after which a checkpoint that is not in use is removed.",
            ),
        ],
    },
    Section {
        title: "Data sets and evaluators",
        variables: &[
            optional(
                "GRAIL_DATASET_PATH_GSM8K",
                "the hub's cache, else the hub",
                "File or folder with the rows of gsm8k: parquet, JSON lines or arrow.",
            ),
            optional(
                "GRAIL_DATASET_PATH_MATH",
                "the hub's cache, else the hub",
                "File or folder with the rows of math: parquet, JSON lines or arrow.",
            ),
            optional(
                "GRAIL_DATASET_PATH_MBPP",
                "the hub's cache, else the hub",
                "File or folder with the rows of mbpp: parquet, JSON lines or arrow.",
            ),
            optional(
                "GRAIL_DATASET_PATH_HUMANEVAL",
                "the hub's cache, else the hub",
                "File or folder with the rows of humaneval: parquet, JSON lines or arrow.",
            ),
            optional("GRAIL_DATASET_REVISION_GSM8K", "main", "Commit, tag or branch of gsm8k on the hub."),
            optional("GRAIL_DATASET_REVISION_MATH", "main", "Commit, tag or branch of math on the hub."),
            optional("GRAIL_DATASET_REVISION_MBPP", "main", "Commit, tag or branch of mbpp on the hub."),
            optional("GRAIL_DATASET_REVISION_HUMANEVAL", "main", "Commit, tag or branch of humaneval on the hub."),
            optional(
                "GRAIL_DATASET_OVERRIDE_GSM8K",
                "the published files",
                "Rows and fingerprints of other files of gsm8k, as SPLIT=ROWS:FINGERPRINT.",
            ),
            optional(
                "GRAIL_DATASET_OVERRIDE_MATH",
                "the published files",
                "Rows and fingerprints of other files of math, as SPLIT=ROWS:FINGERPRINT.",
            ),
            optional(
                "GRAIL_DATASET_OVERRIDE_MBPP",
                "the published files",
                "Rows and fingerprints of other files of mbpp, as SPLIT=ROWS:FINGERPRINT.",
            ),
            optional(
                "GRAIL_DATASET_OVERRIDE_HUMANEVAL",
                "the published files",
                "Rows and fingerprints of other files of humaneval, as SPLIT=ROWS:FINGERPRINT.",
            ),
            optional(
                "GRAIL_EVALUATOR_DIR",
                "evaluator-VERSION in GRAIL_BUILD_CACHE_DIR",
                "Folder of the Python side that `setup-evaluator` makes, for mbpp, humaneval and math.",
            ),
            optional(
                "GRAIL_BUILD_CACHE_DIR",
                "$XDG_CACHE_HOME/grail-supervisor or ~/.cache/grail-supervisor",
                "Folder of what is fetched once: the evaluator, and in a checkout libtorch and tokenizers.",
            ),
            optional(
                "GRAIL_EVALUATORS",
                "by the cores: 3 to 16 for programs, 3 to 8 for formulas",
                "Sandboxed interpreters of each kind that judge answers, 2 at least.",
            ),
            with_default(
                "GRAIL_UNSAFE_SANDBOX",
                "false",
                "Run programs of a model although the sandbox lacks a part that is required.",
            ),
        ],
    },
    Section {
        title: "Local demonstration (--local)",
        variables: &[
            optional(
                "GRAIL_LOCAL_BLOCK_MS",
                "1000 for a new chain, else the existing chain's",
                "Length of a block of the simulated chain, in milliseconds.",
            ),
            optional(
                "GRAIL_LOCAL_ENV",
                "gsm8k for a new store, else the existing store's",
                "Environment that the demonstration's checkpoints name: gsm8k, math, mbpp or humaneval.",
            ),
        ],
    },
    Section {
        title: "Logging and monitoring",
        variables: &[
            optional("GRAIL_LOG", "from -v", "Log filter, for instance info,grail=debug."),
            with_default("GRAIL_MONITORING_BACKEND", "null", "Where metrics go: wandb or null."),
            secret("WANDB_API_KEY", "Key for WandB; required with GRAIL_MONITORING_BACKEND=wandb."),
            with_default("WANDB_PROJECT", "grail", "Project at WandB."),
            optional("WANDB_ENTITY", "your own", "Entity at WandB."),
            with_default("WANDB_MODE", "online", "online, offline or disabled."),
        ],
    },
];

/// All variables in order.
pub fn all() -> impl Iterator<Item = &'static Variable> {
    SECTIONS.iter().flat_map(|section| section.variables)
}

/// The variable with this name; aliases do not count.
#[must_use]
pub fn find(name: &str) -> Option<&'static Variable> {
    all().find(|variable| variable.name == name)
}

/// The static spelling of a name that the table knows, also as an alias.
pub(super) fn known_name(name: &str) -> Option<&'static str> {
    all_names().find(|known| *known == name)
}

/// The known name that `name` most likely means, if one is close.
pub(super) fn nearest(name: &str) -> Option<&'static str> {
    let distance = |known: &&'static str| edit_distance(name, known);
    all_names().min_by_key(distance).filter(|known| distance(known) <= 1 + name.len() / 8)
}

fn all_names() -> impl Iterator<Item = &'static str> {
    all().flat_map(|variable| std::iter::once(variable.name).chain(variable.aliases.iter().map(|alias| alias.name())))
}

/// Insertions, deletions and replacements that make one text of the other.
pub(super) fn edit_distance(one: &str, other: &str) -> usize {
    let other: Vec<char> = other.chars().collect();
    let mut row: Vec<usize> = (0..=other.len()).collect();
    for (i, a) in one.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, b) in other.iter().enumerate() {
            let replaced = diagonal + usize::from(a != *b);
            diagonal = row[j + 1];
            row[j + 1] = replaced.min(diagonal + 1).min(row[j] + 1);
        }
    }
    row[other.len()]
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn names_are_unique_and_every_variable_is_explained() {
        let names: Vec<_> = all_names().collect();
        assert_eq!(names.iter().collect::<BTreeSet<_>>().len(), names.len());
        for variable in all() {
            let is_sentence = variable.help.ends_with('.');
            assert_eq!(is_sentence, variable.standing == Active, "{}", variable.name);
            assert_ne!(variable.default.is_empty(), variable.unset.is_empty(), "{}", variable.name);
            assert!(!variable.secret || grail_telemetry::is_secret_name(variable.name), "{}", variable.name);
        }
    }

    #[test]
    fn near_misses_are_recognised() {
        assert_eq!(nearest("GRAIL_PIPELINE_PROOF_GPUS_IDS"), Some("GRAIL_PIPELINE_PROOF_GPU_IDS"));
        assert_eq!(nearest("GRAIL_PIPLINE_BACKEND"), Some("GRAIL_PIPELINE_BACKEND"));
        assert_eq!(nearest("GRAIL_TRAINER_LR"), None);
        assert_eq!(edit_distance("kitten", "sitting"), 3);
    }
}
