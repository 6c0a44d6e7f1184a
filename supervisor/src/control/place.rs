//! Where the control socket of a state directory lies: in it, or, where that path is too long for a socket, at a short path
//! that follows from it. Both ends find it alike.

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use grail_ipc::socket::MAX_SOCKET_PATH_BYTES;
use sha2::{Digest, Sha256};

const NAME: &str = "control.sock";

/// Longest folder under which folders of sockets are made: socket paths are limited to 107 bytes.
const MAX_BASE_BYTES: usize = 70;

/// Path of a control socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    pub path: PathBuf,
    /// The private folder that must be made for it, where it is not in the state directory.
    pub folder: Option<PathBuf>,
}

impl Place {
    /// The place for the state directory `root`, which is absolute and without links.
    #[must_use]
    pub fn of(root: &Path, runtime_base: &Path) -> Self {
        let path = root.join(NAME);
        if path.as_os_str().len() <= MAX_SOCKET_PATH_BYTES {
            return Self { path, folder: None };
        }
        let digest = hex::encode(&Sha256::digest(root.as_os_str().as_bytes())[..6]);
        let folder = socket_base(runtime_base).join(format!("grail-ctl-{digest}"));
        Self { path: folder.join(NAME), folder: Some(folder) }
    }
}

/// The folder under which folders of sockets are made: `runtime_base`, or the one for temporary files where that is too long.
#[must_use]
pub fn socket_base(runtime_base: &Path) -> PathBuf {
    if runtime_base.as_os_str().len() > MAX_BASE_BYTES { std::env::temp_dir() } else { runtime_base.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_socket_lies_in_the_state_directory_where_that_is_short_enough() {
        let base = Path::new("/run/user/1000/grail-supervisor");
        let place = Place::of(Path::new("/var/lib/grail"), base);
        assert_eq!(place, Place { path: "/var/lib/grail/control.sock".into(), folder: None });
        let longest = format!("/{}", "s".repeat(MAX_SOCKET_PATH_BYTES - 2 - NAME.len()));
        assert_eq!(Place::of(Path::new(&longest), base).folder, None);
        for base in [base.to_owned(), PathBuf::from(format!("/{}", "b".repeat(MAX_BASE_BYTES - 1)))] {
            let place = Place::of(Path::new(&format!("{longest}s")), &base);
            assert_eq!(place, Place::of(Path::new(&format!("{longest}s")), &base), "both ends find it");
            assert_ne!(place, Place::of(Path::new(&format!("{longest}t")), &base));
            assert!(place.path.starts_with(&base) && place.path.as_os_str().len() <= MAX_SOCKET_PATH_BYTES);
        }
        let long_base = PathBuf::from(format!("/{}", "b".repeat(MAX_BASE_BYTES)));
        assert_eq!(socket_base(&long_base), std::env::temp_dir());
    }
}
