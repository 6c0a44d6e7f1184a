//! A root folder with the interpreter, what it reads, and one small folder to write in.

use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::statvfs::{FsFlags, statvfs};
use nix::unistd::{chdir, pivot_root};

use super::error::EnterError;
use super::layers::Layer;
use super::plan::View;

/// Where the new root is built before it becomes the root. The first that exists is used; what lies there is seen under
/// [`HOST`] meanwhile.
const SITES: [&str; 4] = ["/tmp", "/run", "/mnt", "/proc"];
/// The host's root inside of the new one, until all is built.
const HOST: &str = "/.host";
/// The only folder to write in.
pub(super) const WRITABLE: &str = "/tmp";
/// Size of [`WRITABLE`], and of the root that holds the mount points.
const SIZE: &str = "size=16m,mode=0755";
/// Where the host has a link for a folder, the loader has it built in.
const LOADER_FOLDERS: [&str; 2] = ["/lib", "/lib64"];
/// A path with more links than this leads nowhere.
const MOST_LINKS: usize = 40;

const HARMLESS: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV);

/// Makes a root folder with only `view` the root of this process.
pub(super) fn enter(view: &View) -> Result<(), EnterError> {
    let nothing = None::<&str>;
    // Nothing that is mounted here is seen outside.
    mount(nothing, "/", nothing, MsFlags::MS_REC | MsFlags::MS_PRIVATE, nothing)
        .map_err(refused("keep mounts private"))?;
    let site = SITES.into_iter().find(|site| Path::new(site).is_dir()).unwrap_or(SITES[0]);
    mount_small(site)?;
    let host = format!("{site}{HOST}");
    make_folder(Path::new(&host))?;
    pivot_root(site, host.as_str()).map_err(refused("change the root"))?;
    chdir("/").map_err(refused("enter the new root"))?;

    // Before anything is shown: what the host has in a folder of this name would be hidden by it.
    make_folder(Path::new(WRITABLE))?;
    mount_small(WRITABLE)?;
    let mut builder = Builder { shown: Vec::new() };
    for folder in &view.folders {
        builder.show(folder)?;
    }
    for file in &view.files {
        builder.show(file)?;
    }
    for folder in LOADER_FOLDERS {
        let folder = Path::new(folder);
        if is_link(&on_host(folder)) && fs::symlink_metadata(folder).is_err() {
            copy_link(folder)?;
        }
    }

    umount2(HOST, MntFlags::MNT_DETACH).map_err(refused("let go of the host's root"))?;
    fs::remove_dir(HOST).map_err(|source| EnterError::Show { path: HOST.into(), source })?;
    let sealed = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY | MsFlags::MS_NOEXEC | HARMLESS;
    mount(nothing, "/", nothing, sealed, nothing).map_err(refused("make the root read-only"))?;
    chdir(WRITABLE).map_err(refused("enter the writable folder"))
}

fn refused(what: &str) -> impl FnOnce(nix::errno::Errno) -> EnterError {
    EnterError::layer(Layer::Namespaces, what)
}

fn mount_small(target: &str) -> Result<(), EnterError> {
    mount(Some("tmpfs"), target, Some("tmpfs"), HARMLESS | MsFlags::MS_NOEXEC, Some(SIZE))
        .map_err(refused(&format!("mount a small file system on {target}")))
}

fn on_host(path: &Path) -> PathBuf {
    Path::new(HOST).join(path.strip_prefix("/").unwrap_or(path))
}

fn is_link(path: &Path) -> bool {
    fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_symlink())
}

fn make_folder(path: &Path) -> Result<(), EnterError> {
    fs::create_dir_all(path).map_err(|source| EnterError::Show { path: path.to_owned(), source })
}

/// Makes the host's link `path` here too.
fn copy_link(path: &Path) -> Result<PathBuf, EnterError> {
    let failed = |source| EnterError::Show { path: path.to_owned(), source };
    let target = fs::read_link(on_host(path)).map_err(failed)?;
    if let Some(parent) = path.parent() {
        make_folder(parent)?;
    }
    match std::os::unix::fs::symlink(&target, path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(failed(error)),
        _ => Ok(target),
    }
}

/// Shows files and folders of the host at their own paths.
struct Builder {
    /// What is visible with all below it.
    shown: Vec<PathBuf>,
}

impl Builder {
    /// Shows `path`, with the links on the way to it.
    fn show(&mut self, path: &Path) -> Result<(), EnterError> {
        let place = self.follow(path)?;
        if self.shown.iter().any(|shown| place.starts_with(shown)) {
            return Ok(());
        }
        let failed = |source| EnterError::Show { path: path.to_owned(), source };
        let source = on_host(&place);
        if fs::metadata(&source).map_err(failed)?.is_dir() {
            make_folder(&place)?;
        } else {
            make_folder(place.parent().unwrap_or(&place))?;
            fs::File::create(&place).map_err(failed)?;
        }
        let nothing = None::<&str>;
        let bind = MsFlags::MS_BIND | MsFlags::MS_REC;
        mount(Some(&source), &place, nothing, bind, nothing).map_err(|error| failed(error.into()))?;
        // What the host's mount forbids must stay forbidden, or the kernel refuses.
        let kept = statvfs(&place).map(|found| mount_flags(found.flags())).map_err(|error| failed(error.into()))?;
        let sealed = MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY | HARMLESS | kept;
        mount(nothing, &place, nothing, sealed, nothing).map_err(|error| failed(error.into()))?;
        self.shown.push(place);
        Ok(())
    }

    /// The path without links that `path` means; every link on the way is made here too, unless it lies in what is shown.
    fn follow(&self, path: &Path) -> Result<PathBuf, EnterError> {
        let mut place = PathBuf::from("/");
        let mut rest: Vec<PathBuf> = components(path);
        let mut links = 0;
        while let Some(next) = rest.pop() {
            if next == Path::new("..") {
                place.pop();
                continue;
            }
            let step = place.join(&next);
            if !is_link(&on_host(&step)) {
                place = step;
                continue;
            }
            links += 1;
            if links > MOST_LINKS {
                let source = io::Error::from_raw_os_error(nix::libc::ELOOP);
                return Err(EnterError::Show { path: path.to_owned(), source });
            }
            let target = if self.shown.iter().any(|shown| step.starts_with(shown)) {
                fs::read_link(&step).map_err(|source| EnterError::Show { path: step.clone(), source })?
            } else {
                copy_link(&step)?
            };
            if target.is_absolute() {
                place = PathBuf::from("/");
            }
            rest.extend(components(&target));
        }
        Ok(place)
    }
}

/// Names and `..` of `path`, last first.
fn components(path: &Path) -> Vec<PathBuf> {
    let named = path.components().filter(|part| matches!(part, Component::Normal(_) | Component::ParentDir));
    named.rev().map(|part| PathBuf::from(part.as_os_str())).collect()
}

fn mount_flags(found: FsFlags) -> MsFlags {
    let pairs = [
        (FsFlags::ST_NOEXEC, MsFlags::MS_NOEXEC),
        (FsFlags::ST_NOATIME, MsFlags::MS_NOATIME),
        (FsFlags::ST_NODIRATIME, MsFlags::MS_NODIRATIME),
        (FsFlags::ST_RELATIME, MsFlags::MS_RELATIME),
    ];
    pairs.into_iter().filter(|(flag, _)| found.contains(*flag)).fold(MsFlags::empty(), |flags, (_, flag)| flags | flag)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_walked_from_the_root_name_by_name() {
        let names = |path: &str| components(Path::new(path)).into_iter().rev().collect::<Vec<_>>();
        assert_eq!(names("/a/./b/../c"), [Path::new("a"), Path::new("b"), Path::new(".."), Path::new("c")]);
        assert_eq!(names("x"), [Path::new("x")]);
        assert_eq!(on_host(Path::new("/lib64/ld.so")), Path::new("/.host/lib64/ld.so"));
        assert_eq!(mount_flags(FsFlags::ST_NOEXEC | FsFlags::ST_RDONLY), MsFlags::MS_NOEXEC);
    }
}
