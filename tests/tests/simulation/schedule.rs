//! What goes wrong, and when: everything follows from the seed.

use std::collections::BTreeMap;
use std::time::Duration;

/// SplitMix64: small, and the same everywhere.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    /// For counts.
    pub fn few(&mut self, bound: u32) -> u32 {
        u32::try_from(self.below(bound.into())).expect("less than a u32")
    }

    /// For sizes.
    pub fn size(&mut self, bound: u32) -> usize {
        self.few(bound) as usize
    }

    /// True `percent` times in a hundred.
    pub fn chance(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    pub fn milliseconds(&mut self, range: std::ops::Range<u64>) -> Duration {
        Duration::from_millis(range.start + self.below(range.end - range.start))
    }
}

/// A number that follows from others, for instance the latency of a request.
pub fn derived(parts: &[u64]) -> u64 {
    parts.iter().fold(0, |state, part| Random::new(state ^ part).next())
}

/// What an incarnation of a worker does wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WorkerFault {
    /// Its program cannot be run.
    NotSpawned,
    DiesStarting,
    HangsStarting,
    OldVersion,
    /// Dies while it proves its `nth` group.
    Dies {
        nth: u64,
    },
    /// Dies at its `nth` group, and its answer still arrives, later than its successor may be there.
    AnswersAfterDeath {
        nth: u64,
    },
    /// Never answers its `nth` group; signs of life go on.
    HangsProving {
        nth: u64,
    },
    /// Stops answering anything at its `nth` group, as after SIGSTOP.
    Freezes {
        nth: u64,
    },
    /// Answers its `nth` group with nonsense.
    Nonsense {
        nth: u64,
    },
    /// Has not enough memory from its `nth` group on.
    OutOfMemory {
        nth: u64,
    },
    /// Its `nth` group gives no finite numbers.
    NotFinite {
        nth: u64,
    },
    DiesReloading,
    HangsReloading,
    RefusesReload,
    /// Loads other weights than those that are wanted, since its folder was changed, and refuses to take the right ones from there.
    ForeignFolder,
}

/// What the store does wrong with puts, one entry a put.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StoreFault {
    /// The put fails and nothing is stored.
    Fails,
    /// The put fails although everything is stored.
    StoresAndFails,
    Slow(Duration),
}

/// Everything that is done to the miner.
#[derive(Debug, Clone)]
pub struct Schedule {
    pub seed: u64,
    pub slots: u32,
    pub max_groups: usize,
    pub open_groups: usize,
    /// By life of the supervisor, slot and incarnation.
    pub workers: BTreeMap<(usize, u32, u64), WorkerFault>,
    /// How long each life of the supervisor lasts before it is killed; the last one is not.
    pub crashes: Vec<Duration>,
    /// Bytes of a torn record that the crash leaves at the end of the spool.
    pub torn_bytes: Vec<usize>,
    pub store: Vec<StoreFault>,
    /// Questions to the store, for a file or about one, that it does not answer before the first that it does.
    pub unread: usize,
    /// Samples of a thousand that fail.
    pub bad_samples: u64,
    /// The server is away in this time after each start of a window.
    pub outage: Option<(Duration, Duration)>,
    /// An operator restarts or empties a slot: life, time, slot, restart.
    pub operator: Vec<(usize, Duration, u32, bool)>,
}

impl Schedule {
    pub fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let slots = 1 + random.few(4);
        let crashes: Vec<Duration> =
            (0..[0, 0, 1, 1, 2][random.size(5)]).map(|_| random.milliseconds(1_000..420_000)).collect();
        let few_crashes = u32::try_from(crashes.len()).expect("two at most");
        let mut workers = BTreeMap::new();
        for life in 0..=crashes.len() {
            for slot in 0..slots {
                for incarnation in 1..=4 {
                    if random.chance(45) {
                        workers.insert((life, slot, incarnation), worker_fault(&mut random));
                    }
                }
            }
        }
        let torn_bytes = crashes.iter().map(|_| if random.chance(40) { random.size(300) } else { 0 }).collect();
        let store = (0..[0, 1, 2, 9][random.size(4)]).map(|_| store_fault(&mut random)).collect();
        let unread = random.size(8);
        let outage = random.chance(25).then(|| (random.milliseconds(0..200_000), random.milliseconds(1_000..60_000)));
        let operator = (0..random.below(3))
            .map(|_| {
                let life = random.size(few_crashes + 1);
                (life, random.milliseconds(1_000..400_000), random.few(slots), random.chance(70))
            })
            .collect();
        Self {
            seed,
            slots,
            max_groups: 4 + random.size(5),
            open_groups: 1 + random.size(6),
            workers,
            crashes,
            torn_bytes,
            store,
            unread,
            bad_samples: if random.chance(30) { random.below(200) } else { 0 },
            outage,
            operator,
        }
    }

    /// Whether some worker in some life is scheduled to do `fault`.
    pub fn has(&self, fault: impl Fn(&WorkerFault) -> bool) -> bool {
        self.workers.values().any(fault)
    }
}

impl Schedule {
    /// The faults of one life as a worker program understands them.
    pub fn fault_text(&self, life: usize) -> String {
        let of_life = self.workers.iter().filter(|((of, _, _), _)| *of == life);
        of_life.map(|((_, slot, epoch), fault)| fault.text(*slot, *epoch)).collect::<Vec<_>>().join(";")
    }
}

impl WorkerFault {
    /// The same at one of the first two groups, for worlds of few groups.
    pub fn sooner(self) -> Self {
        let sooner = |nth: u64| 1 + nth % 2;
        match self {
            Self::Dies { nth } => Self::Dies { nth: sooner(nth) },
            Self::AnswersAfterDeath { nth } => Self::AnswersAfterDeath { nth: sooner(nth) },
            Self::HangsProving { nth } => Self::HangsProving { nth: sooner(nth) },
            Self::Freezes { nth } => Self::Freezes { nth: sooner(nth) },
            Self::Nonsense { nth } => Self::Nonsense { nth: sooner(nth) },
            Self::OutOfMemory { nth } => Self::OutOfMemory { nth: sooner(nth) },
            Self::NotFinite { nth } => Self::NotFinite { nth: sooner(nth) },
            other => other,
        }
    }

    fn text(self, slot: u32, epoch: u64) -> String {
        let (fault, nth) = match self {
            Self::NotSpawned => ("exit=70@starting", 1),
            Self::DiesStarting => ("segv@starting", 1),
            // What waits for the limit of a start is a test of its own.
            Self::HangsStarting => ("slow=700@loaded", 1),
            Self::OldVersion => ("wrong_version@hello", 1),
            Self::Dies { nth } => ("kill@mid_proof", nth),
            Self::AnswersAfterDeath { nth } => ("kill@replying", nth),
            Self::HangsProving { nth } => ("hang@mid_proof", nth),
            Self::Freezes { nth } => ("stop@mid_proof", nth),
            Self::Nonsense { nth } => ("garbage@replying", nth),
            Self::OutOfMemory { nth } => ("oom@mid_proof", nth),
            Self::NotFinite { nth } => ("nan@mid_proof", nth),
            Self::DiesReloading => ("kill@reload", 1),
            Self::HangsReloading => ("hang@reload", 1),
            Self::RefusesReload | Self::ForeignFolder => ("slow=100@reload", 1),
        };
        format!("{fault},slot={slot},epoch={epoch},nth={nth}")
    }
}

fn worker_fault(random: &mut Random) -> WorkerFault {
    let nth = 1 + random.below(4);
    match random.below(28) {
        0 => WorkerFault::NotSpawned,
        1 => WorkerFault::DiesStarting,
        2 => WorkerFault::HangsStarting,
        3 if random.chance(30) => WorkerFault::OldVersion,
        4 | 5 => WorkerFault::HangsProving { nth },
        6 | 7 => WorkerFault::Freezes { nth },
        8 | 9 => WorkerFault::AnswersAfterDeath { nth },
        10 | 11 => WorkerFault::Nonsense { nth },
        12 | 13 => WorkerFault::OutOfMemory { nth },
        14 => WorkerFault::NotFinite { nth },
        15 => WorkerFault::DiesReloading,
        16 => WorkerFault::HangsReloading,
        17 => WorkerFault::RefusesReload,
        _ => WorkerFault::Dies { nth },
    }
}

fn store_fault(random: &mut Random) -> StoreFault {
    match random.below(3) {
        0 => StoreFault::Fails,
        1 => StoreFault::StoresAndFails,
        _ => StoreFault::Slow(random.milliseconds(100..4_000)),
    }
}
