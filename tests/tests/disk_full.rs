//! A disk that fills up under a window: what is spooled still goes out, and the exit says what to do.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::Path;

use grail_tests::binaries::{LIMIT, Run};
use grail_tests::small_disk::SmallDisk;

/// The object of the only window in the local bucket.
fn uploaded(store: &Path) -> Option<Vec<u8>> {
    let folder = std::fs::read_dir(store.join("grail").join("windows")).ok()?;
    let file = folder.flatten().find(|entry| entry.file_name().to_string_lossy().ends_with("-window-3000.parquet"))?;
    std::fs::read(file.path()).ok()
}

#[test]
fn the_window_is_uploaded_although_the_state_directory_is_full() {
    let folder = tempfile::tempdir().unwrap();
    let (small, store) = (folder.path().join("small"), folder.path().join("store"));
    for made in [&small, &store] {
        std::fs::create_dir(made).unwrap();
    }
    let Some(_mounted) = SmallDisk::mount(&small) else {
        println!("skipped: a tmpfs cannot be mounted here (not permitted)");
        return;
    };
    // The bucket lies elsewhere, as a real one does.
    let state = small.join("state");
    std::fs::create_dir(&state).unwrap();
    std::os::unix::fs::symlink(&store, state.join("store")).unwrap();
    let options = ["mine", "--local", "--windows", "2", "--block-ms", "1500", "--max-groups", "200", "--state-dir"];
    let arguments = [&options[..], &[state.to_str().unwrap()]].concat();
    let run = Run::start("grail-supervisor", &arguments, folder.path(), &[]);
    let spooled = || {
        let text = std::fs::read_to_string(state.join("journal.jsonl")).unwrap_or_default();
        text.matches("group_spooled").count()
    };
    let deadline = std::time::Instant::now() + LIMIT;
    while spooled() < 2 {
        assert!(std::time::Instant::now() < deadline, "no group was spooled");
        std::thread::sleep(std::time::Duration::from_millis(20));
    }
    let mut filler = std::fs::File::create(small.join("filler")).unwrap();
    while filler.write_all(&[0; 1 << 12]).is_ok() {}

    let ended = run.wait();
    assert_eq!(ended.code, Some(73), "{ended:#?}");
    let error = ended.stderr.lines().filter(|line| line.starts_with("grail-supervisor: error")).collect::<String>();
    assert!(error.contains(small.to_str().unwrap()) && error.contains("free space"), "{error}");

    let spool = grail_supervisor::spool::read(&state.join("spool").join("window-3000.sent")).unwrap();
    let signed: BTreeSet<i64> = spool.1.iter().map(|group| group.group.0).collect();
    assert!(signed.len() >= 2 && signed.len() >= spooled(), "{signed:?}");
    let content = uploaded(&store).expect("the window is in the bucket");
    let file = grail_protocol::window_file::read_bytes(content).unwrap();
    let groups: BTreeSet<i64> = file.rows.iter().filter_map(|row| row.rollout_group).collect();
    assert_eq!(groups, signed);
}
