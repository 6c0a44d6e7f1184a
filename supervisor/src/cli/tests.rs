//! Definitions of the command line.

use super::*;

fn parse(words: &[&str]) -> Result<Cli, clap::Error> {
    Cli::try_parse_from([&["grail-supervisor"], words].concat())
}

fn long_help(path: &[&str]) -> String {
    let mut command = Cli::command().term_width(100);
    command.build();
    let mut found = &mut command;
    for name in path {
        found = found.find_subcommand_mut(name).unwrap();
    }
    found.render_long_help().to_string()
}

#[test]
fn definitions_are_consistent() {
    Cli::command().debug_assert();
}

#[test]
fn help_texts() {
    insta::assert_snapshot!("help", long_help(&[]));
    for name in ["mine", "verify", "status", "restart", "reload-checkpoint", "stop", "config", "completions", "man"] {
        insta::assert_snapshot!(format!("help_{name}"), long_help(&[name]));
    }
    insta::assert_snapshot!("help_setup-evaluator", long_help(&["setup-evaluator"]));
    insta::assert_snapshot!("help_env", long_help(&["env"]));
    for name in ["list", "show", "prompt", "score"] {
        insta::assert_snapshot!(format!("help_env_{name}"), long_help(&["env", name]));
    }
    insta::assert_snapshot!("help_checkpoint", long_help(&["checkpoint"]));
    for name in ["list", "show", "fetch", "verify", "prune"] {
        insta::assert_snapshot!(format!("help_checkpoint_{name}"), long_help(&["checkpoint", name]));
    }
}

#[test]
fn the_help_lists_every_exit_code() {
    let help = long_help(&[]);
    assert!(ExitCode::ALL.iter().all(|code| help.contains(code.meaning())), "{help}");
}

#[test]
fn verbosity_and_file_are_read_before_and_after_the_command() {
    for words in [["-vv", "--env-file", "x", "mine"], ["mine", "--env-file", "x", "-vv"]] {
        let cli = parse(&words).unwrap();
        assert_eq!((cli.global.verbose, cli.global.env_file), (2, Some(PathBuf::from("x"))), "{words:?}");
    }
    assert_eq!(parse(&["-v", "config"]).unwrap().global.verbose, 1);
}

#[test]
fn options_that_stand_for_variables_name_themselves() {
    let cli = parse(&["mine", "--local", "--block-ms", "500", "--max-groups", "12", "--state-dir", "/s"]).unwrap();
    let Command::Mine(args) = cli.command else { panic!("mine was asked for") };
    let values = args.flag_values();
    let texts: Vec<_> = values.iter().map(|value| (value.flag, value.value.as_str())).collect();
    assert_eq!(texts, [("--block-ms", "500"), ("--max-groups", "12"), ("--state-dir", "/s")]);
    assert!(values.iter().all(|value| {
        crate::config::SECTIONS
            .iter()
            .flat_map(|section| section.variables)
            .any(|variable| variable.name == value.variable)
    }));
}

#[test]
fn limits_of_prune_stand_for_their_variables() {
    let words = ["checkpoint", "prune", "--keep", "2", "--max-gib", "9", "--max-age-days", "3", "--state-dir", "/s"];
    let Command::Checkpoint(args) = parse(&words).unwrap().command else { panic!("checkpoint was asked for") };
    let values = args.command.flag_values();
    let texts: Vec<_> = values.iter().map(|value| (value.variable, value.value.as_str())).collect();
    let expected = [
        ("GRAIL_KEEP_CHECKPOINTS", "2"),
        ("GRAIL_KEEP_CHECKPOINTS_GIB", "9"),
        ("GRAIL_KEEP_CHECKPOINTS_DAYS", "3"),
        ("GRAIL_STATE_DIR", "/s"),
    ];
    assert_eq!(texts, expected);
}

#[test]
fn a_window_that_is_none_is_told_which_one_is_meant() {
    let error = parse(&["checkpoint", "list", "--window", "3001"]).unwrap_err().to_string();
    assert!(error.contains("block 3001 is in window 3000"), "{error}");
}

#[test]
fn usage_errors() {
    for words in [
        &["verify"][..],
        &["verify", "f", "--local"],
        &["verify", "--local", "--context", "c"],
        &["verify", "f", "--challenge-randomness", "xyz"],
        &["mine", "--windows", "0"],
        &["mine", "--seed", "s"],
        &["config", "--json", "--example"],
        &["completions", "tcsh"],
        &["plan"],
        &["restart"],
        &["drain", "one"],
        &["stop", "0"],
        &["checkpoint"],
        &["checkpoint", "show"],
        &["checkpoint", "fetch", "newest"],
        &["checkpoint", "list", "--window", "3001"],
        &["checkpoint", "list", "--cache-only", "--store-only"],
        &["checkpoint", "prune", "--keep", "few"],
        &["env"],
        &["env", "show", "mbpp"],
        &["env", "show", "mbpp", "--seed", "1", "--task", "train_1"],
        &["env", "show", "mbpp", "--group", "1"],
        &["env", "show", "triton_kernel", "--seed", "1"],
        &["env", "prompt", "mbpp", "--seed", "1"],
        &["env", "show", "math", "--group", "3", "--hotkey", "5F", "--window-hash", &format!("0x{}", "ab".repeat(32))],
        &[
            "env",
            "show",
            "math",
            "--group",
            "3",
            "--hotkey",
            "5DtDLm5rQHShDqojQpsvcN8tRXHVFaecfDoRet1SU6BFD9Fi",
            "--window-hash",
            &format!("0x{}", "AB".repeat(32)),
        ],
        &["env", "score", "mbpp"],
        &["env", "score", "mbpp", "f", "--thinking-mode", "loud"],
        &["mine", "--env", "mbpp"],
        &["mine", "--local", "--env", "mbpp", "--no-trainer"],
    ] {
        let error = parse(words).unwrap_err();
        assert_eq!(error.exit_code(), i32::from(ExitCode::Usage.number()), "{words:?}: {error}");
    }
    for words in [
        &["verify", "f"][..],
        &["verify", "--local"],
        &["mine", "--no-drand"],
        &["mine", "--use-drand"],
        &["checkpoint", "list", "--window", "3000"],
        &["checkpoint", "fetch", "latest"],
        &["checkpoint", "fetch", "3150"],
        &["checkpoint", "verify"],
        &["env", "list"],
        &["env", "show", "python_code", "--task", "train_1"],
        &[
            "env",
            "show",
            "math",
            "--group",
            "3",
            "--hotkey",
            "5DtDLm5rQHShDqojQpsvcN8tRXHVFaecfDoRet1SU6BFD9Fi",
            "--window-hash",
            &format!("0x{}", "ab".repeat(32)),
        ],
        &["env", "prompt", "gsm8k", "--seed", "1", "--checkpoint", "3000"],
        &["env", "score", "mbpp", "-"],
        &["setup-evaluator", "--probe"],
        &["mine", "--local", "--env", "mbpp", "--unsafe-sandbox"],
    ] {
        parse(words).unwrap();
    }
}

#[test]
fn every_shell_gets_a_script_and_the_manual_has_every_command() {
    for shell in [Shell::Bash, Shell::Zsh, Shell::Fish, Shell::Elvish, Shell::PowerShell] {
        let script = String::from_utf8(completions(shell)).unwrap();
        assert!(script.contains("--challenge-randomness") || script.contains("challenge-randomness"), "{shell}");
    }
    let page = String::from_utf8(manual().unwrap()).unwrap();
    for word in [
        "mine",
        "verify",
        "status",
        "quarantine",
        "GRAIL_SHUTDOWN_TIMEOUT",
        "config",
        "temporary failure, start again",
        "checkpoint prune",
        "env score",
        "setup-evaluator",
        "GRAIL_KEEP_CHECKPOINTS_GIB",
    ] {
        assert!(page.contains(word), "{word}");
    }
}
