//! Installations that end in the middle: the process is killed, the disk is full.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

use crate::faulty::{Fault, FaultyStore, checkpoints, metadata_input};
use crate::trainer::Trainer;
use grail_checkpoint::cache::Entry;
use grail_checkpoint::{CheckpointCache, FailureClass, InstallError, ProgressFn, Wanted, publish_full};
use grail_protocol::ids::CheckpointWindow;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use object_store::local::LocalFileSystem;

/// Set in the process that is killed: the folder that has its store and its cache.
const CHILD: &str = "GRAIL_CHECKPOINT_TEST_KILLED_IN";
const WINDOW: CheckpointWindow = CheckpointWindow(300);

fn faulty(folder: &Path) -> Arc<FaultyStore> {
    FaultyStore::over(Arc::new(LocalFileSystem::new_with_prefix(folder.join("store")).unwrap()))
}

/// Says when the first range of the weights is on the disk, and waits to be killed while the others do not come.
async fn install_and_hang(folder: &Path) {
    let store = faulty(folder);
    let published = checkpoints(&store).published(WINDOW).await.unwrap();
    store.fail(Fault::HangAfter { bodies: 6 });
    let cache = CheckpointCache::open(folder.join("cache")).unwrap();
    let ranges = cache.root().join("checkpoint-300.download/FULL/model.safetensors.ranges");
    let (checkpoints, wanted) = (checkpoints(&store), Wanted::default());
    let first_range = async {
        while !ranges.exists() {
            tokio::task::yield_now().await;
        }
        println!("hanging");
        std::future::pending::<()>().await;
    };
    tokio::select! {
        ended = cache.install(&checkpoints, &published, &wanted) => panic!("the installation ended: {ended:?}"),
        () = first_range => {}
    }
}

#[tokio::test]
async fn an_installation_whose_process_was_killed_is_gone_on_with() {
    if let Some(folder) = std::env::var_os(CHILD) {
        return install_and_hang(Path::new(&folder)).await;
    }
    let trainer = Trainer::new();
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join("store")).unwrap();
    let store = faulty(folder.path());
    publish_full(&checkpoints(&store), WINDOW, &trainer.version(300), &metadata_input(), 300).await.unwrap();

    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "interrupted::an_installation_whose_process_was_killed_is_gone_on_with", "--nocapture"])
        .env(CHILD, folder.path())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    assert!(lines.any(|line| line.unwrap().contains("hanging")), "the child ended before it hung");
    child.kill().unwrap();
    assert_eq!(child.wait().unwrap().signal(), Some(9));

    let root = folder.path().join("cache");
    let cache = CheckpointCache::open(&root).unwrap();
    // The remains of a build that was killed, beside those of the download.
    std::fs::create_dir(root.join(format!("checkpoint-330.{}.0123abcd.partial", child.id()))).unwrap();
    assert!(matches!(cache.inspect(WINDOW), Entry::Absent));
    store.take_requests();
    let published = checkpoints(&store).published(WINDOW).await.unwrap();
    store.take_requests();
    let installed = cache.install(&checkpoints(&store), &published, &Wanted::default()).await.unwrap();
    assert_eq!(installed.weights_hash, trainer.hash(300));
    let fetched = store.take_requests().len();
    assert!(fetched < 15, "all {fetched} bodies were fetched again");
    let names: Vec<_> = std::fs::read_dir(&root).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    assert_eq!(names.len(), 2, "{names:?}");
    assert!(matches!(cache.inspect(WINDOW), Entry::Installed(_)));
}

#[tokio::test]
async fn room_is_asked_for_before_anything_is_fetched_and_other_downloads_give_way() {
    let trainer = Trainer::chain([]).await;
    let other = trainer.cache.root().join("checkpoint-990.download/FULL");
    std::fs::create_dir_all(&other).unwrap();
    let published = trainer.checkpoints.published(WINDOW).await.unwrap();
    trainer.store.fail(Fault::Inflated);
    trainer.store.take_requests();
    let error = trainer.cache.install(&trainer.checkpoints, &published, &Wanted::default()).await.unwrap_err();
    assert!(error.is_disk_full() && error.class() == FailureClass::NoSpace, "{error}");
    assert!(error.to_string().contains("free space there"), "{error}");
    assert_eq!(trainer.store.take_requests(), []);
    assert_eq!(trainer.names(), [""; 0]);
}

/// A small file system that goes with the test; `None` where that is not permitted.
struct SmallDisk<'a>(&'a Path);

impl<'a> SmallDisk<'a> {
    fn mount(at: &'a Path, kib: u32) -> Option<Self> {
        let size = format!("size={kib}k");
        let mounted = mount(Some("tmpfs"), at, Some("tmpfs"), MsFlags::empty(), Some(size.as_str()));
        if mounted.is_err() {
            eprintln!("skipped: mounting is not permitted here");
        }
        mounted.ok().map(|()| Self(at))
    }
}

impl Drop for SmallDisk<'_> {
    fn drop(&mut self) {
        umount2(self.0, MntFlags::MNT_DETACH).expect("what was mounted can be unmounted");
    }
}

/// The disk fills up while a full tree is fetched, and while a delta is.
#[tokio::test]
async fn a_disk_that_fills_up_on_the_way_leaves_no_half_checkpoint() {
    for installed_before in [false, true] {
        let trainer = Trainer::chain([330]).await;
        let Some(_disk) = SmallDisk::mount(trainer.cache.root(), 64) else { return };
        let target = if installed_before { 330 } else { 300 };
        if installed_before {
            trainer.install(300).await.unwrap();
        }
        let filler = trainer.cache.root().join("filler");
        let fill = ProgressFn::new({
            let filler = filler.clone();
            move |_| {
                let mut file = File::options().append(true).create(true).open(&filler).unwrap();
                while file.write(&[0; 4096]).is_ok_and(|written| written > 0) {}
            }
        });
        let wanted = Wanted { progress: Some(fill), ..Wanted::default() };
        let error = trainer.install_wanted(target, &wanted).await.unwrap_err();
        assert!(error.is_disk_full(), "{error}");
        assert_eq!(trainer.windows(), if installed_before { vec![300] } else { vec![] });
        std::fs::remove_file(&filler).unwrap();
        trainer.assert_has(&trainer.install(target).await.unwrap(), target);
    }
}

/// Bytes of the file with which the next test's tree is larger than what its disk has left.
const LARGE: usize = 96 << 10;

#[tokio::test]
async fn what_a_broken_download_has_on_the_disk_needs_no_more_room() {
    let trainer = Trainer::new();
    std::fs::write(trainer.version(300).join("large"), [7; LARGE]).unwrap();
    trainer.full(300).await;
    let Some(_disk) = SmallDisk::mount(trainer.cache.root(), 256) else { return };
    let folder = trainer.cache.root().join("checkpoint-300.download/FULL");
    std::fs::create_dir_all(&folder).unwrap();
    std::fs::write(folder.join("large"), [7; LARGE]).unwrap();
    // 256 KiB less the large file and this leave 64, which is less than the whole tree.
    std::fs::write(trainer.cache.root().join("filler"), [0; LARGE]).unwrap();
    trainer.assert_has(&trainer.install(300).await.unwrap(), 300);

    trainer.cache.remove(CheckpointWindow(300)).await.unwrap();
    std::fs::write(trainer.cache.root().join("filler"), [0; 2 * LARGE]).unwrap();
    std::fs::create_dir_all(&folder).unwrap();
    // One range of many was written of this one: it only looks as if it were there.
    File::create(folder.join("large")).unwrap().set_len(LARGE as u64).unwrap();
    trainer.store.take_requests();
    let error = trainer.install(300).await.unwrap_err();
    assert!(matches!(error, InstallError::NoSpace { needed, .. } if needed > LARGE as u64), "{error}");
    assert!(trainer.store.take_keys().iter().all(|key| key.ends_with("metadata.json")), "nothing of it was fetched");
}
