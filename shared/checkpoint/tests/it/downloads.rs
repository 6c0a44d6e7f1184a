//! One object into one file, whatever happens on the way.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::faulty::{Fault, FaultyStore, Request, checkpoints, hasty, impatient};
use grail_checkpoint::store::Fetched;
use grail_checkpoint::{CheckpointStore, Limits, StoreError};
use object_store::ObjectStore;
use sha2::{Digest, Sha256};

const KEY: &str = "grail/checkpoints/checkpoint-300/FULL/model.safetensors";

struct Bench {
    store: Arc<FaultyStore>,
    checkpoints: CheckpointStore,
    bytes: Vec<u8>,
    target: PathBuf,
    folder: tempfile::TempDir,
}

impl Bench {
    /// A store with one object of 10 full ranges and half of one.
    async fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = FaultyStore::new();
        let bytes: Vec<u8> = (0..10_500_u32).map(|index| (index * index).to_be_bytes()[2]).collect();
        store.overwrite(KEY, bytes.clone()).await;
        Self { checkpoints: checkpoints(&store), store, bytes, target: folder.path().join("file"), folder }
    }

    async fn download(&self) -> Result<Fetched, StoreError> {
        self.checkpoints.download(KEY, &self.target).await
    }

    /// The ranges that were asked for since the last call.
    fn ranges(&self) -> Vec<(u64, u64)> {
        let ranges = self.store.take_requests().into_iter().map(|Request { key, range }| {
            assert_eq!(key, KEY);
            let range = range.unwrap();
            (range.start, range.end)
        });
        let mut ranges: Vec<_> = ranges.collect();
        ranges.sort_unstable();
        ranges
    }

    fn assert_whole(&self, fetched: &Fetched) {
        assert_eq!(std::fs::read(&self.target).unwrap(), self.bytes);
        assert_eq!((fetched.bytes, fetched.sha256.0), (10_500, Sha256::digest(&self.bytes).into()));
        assert_eq!(self.names(), BTreeSet::from(["file".to_owned()]));
    }

    fn names(&self) -> BTreeSet<String> {
        let entries = std::fs::read_dir(self.folder.path()).unwrap();
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
    }
}

fn all_ranges() -> Vec<(u64, u64)> {
    (0..11).map(|range| (range * 1000, (range * 1000 + 1000).min(10_500))).collect()
}

#[tokio::test]
async fn a_large_object_comes_in_ranges() {
    let bench = Bench::new().await;
    bench.assert_whole(&bench.download().await.unwrap());
    assert_eq!(bench.ranges(), all_ranges());
}

#[tokio::test]
async fn a_small_object_comes_in_one_and_an_empty_one_in_none() {
    let bench = Bench::new().await;
    bench.store.overwrite("small", "abc").await;
    bench.store.overwrite("empty", "").await;
    for (key, bytes) in [("small", 3), ("empty", 0)] {
        assert_eq!(bench.checkpoints.download(key, &bench.target).await.unwrap().bytes, bytes);
        assert_eq!(std::fs::metadata(&bench.target).unwrap().len(), bytes);
    }
    assert_eq!(bench.store.take_requests(), [Request { key: "small".to_owned(), range: Some(0..3) }]);
}

#[tokio::test]
async fn a_server_that_fails_is_asked_again() {
    let bench = Bench::new().await;
    for (heads, times) in [(true, 2), (false, 2)] {
        bench.store.fail(Fault::Failing { key: KEY.to_owned(), times, heads });
        bench.assert_whole(&bench.download().await.unwrap());
    }
    assert_eq!(bench.ranges().len(), 2 * 11 + 2);
    for heads in [true, false] {
        bench.store.fail(Fault::Failing { key: KEY.to_owned(), times: usize::MAX, heads });
        let error = bench.download().await.unwrap_err();
        assert!(matches!(error, StoreError::Read { .. }), "{error}");
    }
}

#[tokio::test]
async fn a_body_that_breaks_goes_on_where_it_broke() {
    let faults = [Fault::Cut { key: KEY.to_owned(), bytes: 400 }, Fault::Reset { key: KEY.to_owned(), bytes: 400 }];
    for fault in faults {
        let bench = Bench::new().await;
        bench.store.fail(fault);
        bench.assert_whole(&bench.download().await.unwrap());
        let thirds = all_ranges().into_iter().flat_map(|(start, end)| {
            [start, start + 400, start + 800]
                .into_iter()
                .filter(move |start| *start < end)
                .map(move |start| (start, end))
        });
        assert_eq!(bench.ranges(), thirds.collect::<Vec<_>>());
    }
}

#[tokio::test]
async fn what_arrived_before_an_outage_is_not_fetched_again() {
    let bench = Bench::new().await;
    bench.store.fail(Fault::Outage { bodies: 4 });
    let error = bench.download().await.unwrap_err();
    assert!(matches!(error, StoreError::Read { .. }) && error.is_transient(), "{error}");
    assert_eq!(bench.names(), BTreeSet::from(["file".to_owned(), "file.ranges".to_owned()]));
    let first: BTreeSet<_> = bench.ranges().into_iter().collect();

    bench.store.heal();
    bench.assert_whole(&bench.download().await.unwrap());
    let second = bench.ranges();
    assert_eq!(second.len(), 7, "4 of 11 ranges were here");
    assert!(first.iter().copied().chain(second).collect::<BTreeSet<_>>().into_iter().eq(all_ranges()));
}

#[tokio::test]
async fn nothing_of_another_version_is_gone_on_with() {
    let mut bench = Bench::new().await;
    bench.store.fail(Fault::Outage { bodies: 4 });
    bench.download().await.unwrap_err();
    bench.ranges();
    bench.store.heal();
    bench.bytes.reverse();
    bench.store.overwrite(KEY, bench.bytes.clone()).await;
    bench.assert_whole(&bench.download().await.unwrap());
    assert_eq!(bench.ranges(), all_ranges());
}

#[tokio::test]
async fn an_object_that_is_replaced_meanwhile_is_no_mixture() {
    let bench = Bench::new().await;
    let with = bench.bytes.iter().rev().copied().collect::<Vec<u8>>().into();
    bench.store.fail(Fault::Replaced { key: KEY.to_owned(), with });
    let error = bench.download().await.unwrap_err();
    assert!(matches!(error, StoreError::Changed { .. }) && !error.is_transient(), "{error}");
}

#[tokio::test]
async fn silence_ends_after_the_stall_limit_and_its_repetitions() {
    let bench = Bench::new().await;
    bench.store.fail(Fault::Silent { key: KEY.to_owned() });
    let error = hasty(&bench.store).download(KEY, &bench.target).await.unwrap_err();
    assert!(matches!(error, StoreError::Stalled { .. }) && error.is_transient(), "{error}");
    let asked = bench.ranges().into_iter().filter(|(start, _)| *start == 0).count();
    assert_eq!(asked, 3);
}

#[tokio::test]
async fn absence_and_refusal_are_not_asked_again() {
    let bench = Bench::new().await;
    bench.store.fail(Fault::Denied);
    let error = bench.download().await.unwrap_err();
    assert!(matches!(error, StoreError::Denied { .. }), "{error}");
    assert_eq!(bench.store.heads(), 1);
    bench.store.heal();
    let error = bench.checkpoints.download("absent", &bench.target).await.unwrap_err();
    assert!(matches!(error, StoreError::NotFound { .. }), "{error}");
    assert_eq!(bench.store.heads(), 3, "the object and its compressed twin");
    bench.store.fail(Fault::Vanishing { key: KEY.to_owned() });
    let error = bench.download().await.unwrap_err();
    assert!(matches!(error, StoreError::NotFound { .. }), "{error}");
    assert!(bench.ranges().len() <= 3);
}

#[tokio::test]
async fn a_disk_that_is_full_is_said_to_be() {
    let bench = Bench::new().await;
    bench.store.overwrite("small", "abc").await;
    let error = bench.checkpoints.download("small", Path::new("/dev/full")).await.unwrap_err();
    assert!(matches!(error, StoreError::DiskFull { .. }), "{error}");
}

#[tokio::test]
async fn an_object_above_its_cap_is_not_begun() {
    let bench = Bench::new().await;
    let limits = Limits { weights_bytes: 10_499, ..impatient() };
    let store = CheckpointStore::with_limits(bench.store.clone() as Arc<dyn ObjectStore>, limits);
    let error = store.download(KEY, &bench.target).await.unwrap_err();
    assert!(matches!(error, StoreError::TooLarge { cap: 10_499, .. }), "{error}");
    assert_eq!(bench.ranges(), []);
    assert!(!bench.target.exists());
}
