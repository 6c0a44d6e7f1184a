//! A disk that is soon full.

use std::path::Path;

use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// A file system of 64 MiB that goes with the test.
#[derive(Debug)]
pub struct SmallDisk<'a>(&'a Path);

impl<'a> SmallDisk<'a> {
    /// Mounts one at an existing folder; `None` where that is not permitted.
    #[must_use]
    pub fn mount(at: &'a Path) -> Option<Self> {
        mount(Some("tmpfs"), at, Some("tmpfs"), MsFlags::empty(), Some("size=64m")).ok()?;
        Some(Self(at))
    }
}

impl Drop for SmallDisk<'_> {
    fn drop(&mut self) {
        umount2(self.0, MntFlags::MNT_DETACH).expect("what was mounted can be unmounted");
    }
}
