//! Landlock: what the kernel lets this process and its children do with files, ports and others' signals.

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetStatus, Scope,
};

use super::error::EnterError;
use super::plan::View;
use super::root::WRITABLE;

/// What is asked for; older kernels give what they have, from version 1 on.
const WANTED: ABI = ABI::V6;

/// Lets this process read `view`, write in the writable folder if it has one, and nothing else; no TCP, no sockets and signals
/// of others.
pub(super) fn files_and_sockets(view: &View, has_writable: bool) -> Result<(), EnterError> {
    let readable = AccessFs::from_read(WANTED);
    let mut rules = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(WANTED))?
        .handle_access(AccessNet::from_all(WANTED))?
        .scope(Scope::AbstractUnixSocket | Scope::Signal)?
        .create()?;
    for path in view.folders.iter().chain(&view.files) {
        // A file can only have rights of files.
        let rights = if path.is_dir() { readable } else { readable & AccessFs::from_file(WANTED) };
        rules = rules.add_rule(PathBeneath::new(open(path)?, rights))?;
    }
    if has_writable {
        let here = std::path::Path::new(WRITABLE);
        rules = rules.add_rule(PathBeneath::new(open(here)?, AccessFs::from_all(WANTED) & !AccessFs::Execute))?;
    }
    match rules.restrict_self()?.ruleset {
        RulesetStatus::FullyEnforced | RulesetStatus::PartiallyEnforced => Ok(()),
        RulesetStatus::NotEnforced => Err(EnterError::LandlockAbsent),
    }
}

fn open(path: &std::path::Path) -> Result<PathFd, EnterError> {
    PathFd::new(path).map_err(|error| EnterError::Show { path: path.to_owned(), source: std::io::Error::other(error) })
}
