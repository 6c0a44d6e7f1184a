//! A disk that is soon full.

use std::path::Path;

use nix::mount::{MntFlags, MsFlags, mount, umount2};

/// A file system in memory that goes with the test.
#[derive(Debug)]
pub struct SmallDisk<'a>(&'a Path);

impl<'a> SmallDisk<'a> {
    /// Mounts one of 64 MiB at an existing folder; `None` where that is not permitted.
    #[must_use]
    pub fn mount(at: &'a Path) -> Option<Self> {
        Self::mount_sized(at, 64 << 20)
    }

    /// As [`Self::mount`], with room for so many bytes.
    #[must_use]
    pub fn mount_sized(at: &'a Path, bytes: u64) -> Option<Self> {
        let size = format!("size={bytes}");
        mount(Some("tmpfs"), at, Some("tmpfs"), MsFlags::empty(), Some(size.as_str())).ok()?;
        Some(Self(at))
    }

    /// Has room for so many bytes from now on.
    ///
    /// # Panics
    /// If it cannot be changed.
    pub fn resize(&self, bytes: u64) {
        let size = format!("size={bytes}");
        let changed = mount(Some("tmpfs"), self.0, Some("tmpfs"), MsFlags::MS_REMOUNT, Some(size.as_str()));
        changed.expect("what was mounted can be mounted anew");
    }
}

impl Drop for SmallDisk<'_> {
    fn drop(&mut self) {
        umount2(self.0, MntFlags::MNT_DETACH).expect("what was mounted can be unmounted");
    }
}
