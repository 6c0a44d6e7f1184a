//! Namespaces of this process's own.

use std::io;

use nix::sched::{CloneFlags, unshare as unshare_flags};
use nix::unistd::{getegid, geteuid};

use super::error::EnterError;
use super::layers::Layer;

/// Leaves the host's namespaces. The namespace of users makes the others possible without privileges; where it is forbidden,
/// privileges do. The namespace of processes begins with the next process.
pub(super) fn unshare() -> Result<(), EnterError> {
    let others = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWPID
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS;
    // Read before: inside, all users are nobody until they are mapped.
    let (user, group) = (geteuid(), getegid());
    match unshare_flags(CloneFlags::CLONE_NEWUSER | others) {
        Ok(()) => map_identity(user.as_raw(), group.as_raw()),
        Err(refusal) => unshare_flags(others).map_err(|_| {
            EnterError::layer(Layer::Namespaces, "leave the host's namespaces, which this kernel or container forbids")(
                refusal,
            )
        }),
    }
}

/// Root inside is this user outside; nobody else exists.
fn map_identity(user: u32, group: u32) -> Result<(), EnterError> {
    let write = |file: &str, text: String| {
        std::fs::write(format!("/proc/self/{file}"), text).map_err(|source: io::Error| EnterError::Layer {
            layer: Layer::Namespaces,
            what: format!("write {file}"),
            source,
        })
    };
    // Only who cannot change its groups may map one.
    write("setgroups", "deny".to_owned())?;
    write("uid_map", format!("0 {user} 1"))?;
    write("gid_map", format!("0 {group} 1"))
}
