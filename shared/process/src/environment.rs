//! The variables that a child sees: never a secret unless it is given by name.

use std::collections::BTreeMap;
use std::ffi::OsString;

use grail_telemetry::is_secret_name;

/// Variables that every child may inherit; an entry that ends in `*` is a beginning.
pub const HARMLESS: [&str; 25] = [
    "PATH",
    "HOME",
    "USER",
    "LOGNAME",
    "LANG",
    "LC_*",
    "TZ",
    "TMPDIR",
    "XDG_CACHE_HOME",
    "NO_COLOR",
    "RUST_BACKTRACE",
    "RUST_LIB_BACKTRACE",
    "GRAIL_LOG",
    "GRAIL_LIBTORCH_DIR",
    "GRAIL_PROOF_KERNELS",
    "GRAIL_RELOAD_SHADOW",
    "LD_LIBRARY_PATH",
    "CUDA_VISIBLE_DEVICES",
    "CUDA_DEVICE_ORDER",
    "CUDA_HOME",
    "CUDA_CACHE_PATH",
    "NVIDIA_VISIBLE_DEVICES",
    "NVIDIA_DRIVER_CAPABILITIES",
    "OMP_*",
    "MKL_*",
];

/// How a child's environment comes from ours.
#[derive(Debug, Clone)]
pub struct Environment {
    inherit: Inherit,
    set: BTreeMap<OsString, OsString>,
}

#[derive(Debug, Clone)]
enum Inherit {
    Only(Vec<String>),
    AllExcept(Vec<String>),
}

impl Default for Environment {
    fn default() -> Self {
        Self::harmless()
    }
}

impl Environment {
    /// The variables of [`HARMLESS`].
    #[must_use]
    pub fn harmless() -> Self {
        Self::only(HARMLESS)
    }

    /// Nothing.
    #[must_use]
    pub fn empty() -> Self {
        Self::only::<&str>([])
    }

    /// The variables that `names` match, for which an entry that ends in `*` is a beginning. A secret is inherited only if an
    /// entry names it in full.
    #[must_use]
    pub fn only<S: Into<String>>(names: impl IntoIterator<Item = S>) -> Self {
        Self { inherit: Inherit::Only(names.into_iter().map(Into::into).collect()), set: BTreeMap::new() }
    }

    /// Everything but secrets and what `names` match: for programs of others, whose knobs nobody can list.
    #[must_use]
    pub fn all_except<S: Into<String>>(names: impl IntoIterator<Item = S>) -> Self {
        Self { inherit: Inherit::AllExcept(names.into_iter().map(Into::into).collect()), set: BTreeMap::new() }
    }

    /// Sets a variable, whatever is inherited.
    #[must_use]
    pub fn with(mut self, name: impl Into<OsString>, value: impl Into<OsString>) -> Self {
        self.set(name, value);
        self
    }

    /// Sets a variable, whatever is inherited.
    pub fn set(&mut self, name: impl Into<OsString>, value: impl Into<OsString>) {
        self.set.insert(name.into(), value.into());
    }

    /// The child's variables, from those of the parent.
    #[must_use]
    pub fn resolve(&self, parent: impl IntoIterator<Item = (OsString, OsString)>) -> BTreeMap<OsString, OsString> {
        let mut variables: BTreeMap<OsString, OsString> =
            parent.into_iter().filter(|(name, _)| self.inherits(&name.to_string_lossy())).collect();
        variables.extend(self.set.clone());
        variables
    }

    fn inherits(&self, name: &str) -> bool {
        match &self.inherit {
            Inherit::Only(names) if is_secret_name(name) => names.iter().any(|entry| entry == name),
            Inherit::Only(names) => names.iter().any(|entry| matches(entry, name)),
            Inherit::AllExcept(names) => !is_secret_name(name) && !names.iter().any(|entry| matches(entry, name)),
        }
    }
}

fn matches(entry: &str, name: &str) -> bool {
    match entry.strip_suffix('*') {
        Some(beginning) => name.starts_with(beginning),
        None => entry == name,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolved(environment: &Environment) -> Vec<String> {
        let parent = [
            ("PATH", "/bin"),
            ("LC_ALL", "C"),
            ("AWS_SECRET_ACCESS_KEY", "x"),
            ("HF_TOKEN", "y"),
            ("OMP_NUM_THREADS", "2"),
            ("EDITOR", "vi"),
            ("BT_WALLET_COLD", "w"),
        ];
        environment
            .resolve(parent.map(|(name, value)| (name.into(), value.into())))
            .into_iter()
            .map(|(name, value)| format!("{}={}", name.display(), value.display()))
            .collect()
    }

    #[test]
    fn only_what_is_listed_is_inherited() {
        assert_eq!(resolved(&Environment::harmless()), ["LC_ALL=C", "OMP_NUM_THREADS=2", "PATH=/bin"]);
        assert_eq!(resolved(&Environment::empty().with("A", "b")), ["A=b"]);
        assert_eq!(resolved(&Environment::only(["PATH"]).with("PATH", "/opt")), ["PATH=/opt"]);
    }

    #[test]
    fn a_secret_is_inherited_only_by_its_full_name() {
        assert_eq!(resolved(&Environment::only(["*"])), ["EDITOR=vi", "LC_ALL=C", "OMP_NUM_THREADS=2", "PATH=/bin"]);
        assert_eq!(resolved(&Environment::only(["HF_*"])), Vec::<String>::new());
        assert_eq!(resolved(&Environment::only(["HF_TOKEN"])), ["HF_TOKEN=y"]);
        assert_eq!(resolved(&Environment::all_except(["LC_*", "EDITOR"])), ["OMP_NUM_THREADS=2", "PATH=/bin"]);
    }
}
