//! What lies between a program of a model and this host, layer by layer.

use std::fmt;

use serde::{Deserialize, Serialize};

/// One layer of the sandbox.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Layer {
    /// No new privileges, killed with its parent, no dumps, no tracing, a process group of its own.
    Process,
    /// Limits of memory, CPU time, processes, files and stack.
    Limits,
    /// Namespaces of users, mounts, processes, network, IPC and host name, with a new root that holds the interpreter and one
    /// small folder to write in.
    Namespaces,
    /// Landlock: nothing but the interpreter can be read, and nothing written outside of that folder.
    Landlock,
    /// Filters of system calls, a tighter one for programs than for the interpreter that forks them.
    Seccomp,
    /// A control group with limits of memory and processes, where one was delegated to us.
    Cgroup,
}

impl Layer {
    /// All layers, from the process outwards.
    pub const ALL: [Self; 6] =
        [Self::Process, Self::Limits, Self::Namespaces, Self::Landlock, Self::Seccomp, Self::Cgroup];

    /// Name in reports and logs.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Process => "process",
            Self::Limits => "limits",
            Self::Namespaces => "namespaces",
            Self::Landlock => "landlock",
            Self::Seccomp => "seccomp",
            Self::Cgroup => "cgroup",
        }
    }

    const fn bit(self) -> u8 {
        1 << self as u8
    }
}

impl fmt::Display for Layer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A set of layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Vec<Layer>", into = "Vec<Layer>")]
pub struct LayerSet(u8);

impl LayerSet {
    /// No layer at all.
    pub const NONE: Self = Self(0);

    /// Every layer.
    #[must_use]
    pub fn all() -> Self {
        Layer::ALL.into_iter().collect()
    }

    /// Whether `layer` is in the set.
    #[must_use]
    pub const fn has(self, layer: Layer) -> bool {
        self.0 & layer.bit() != 0
    }

    /// The set with `layer`.
    #[must_use]
    pub const fn with(self, layer: Layer) -> Self {
        Self(self.0 | layer.bit())
    }

    /// The set without `layer`.
    #[must_use]
    pub const fn without(self, layer: Layer) -> Self {
        Self(self.0 & !layer.bit())
    }

    /// The layers that both sets have.
    #[must_use]
    pub const fn both(self, other: Self) -> Self {
        Self(self.0 & other.0)
    }

    /// Its layers in order.
    pub fn iter(self) -> impl Iterator<Item = Layer> {
        Layer::ALL.into_iter().filter(move |layer| self.has(*layer))
    }

    /// What is missing for running programs of a model at all: process, limits and seccomp must work, and one of namespaces
    /// and Landlock. Empty if enough works.
    #[must_use]
    pub fn missing(self) -> Vec<&'static str> {
        let needed = [Layer::Process, Layer::Limits, Layer::Seccomp];
        let mut missing: Vec<_> = needed.into_iter().filter(|layer| !self.has(*layer)).map(Layer::as_str).collect();
        if !self.has(Layer::Namespaces) && !self.has(Layer::Landlock) {
            missing.push("one of namespaces and landlock");
        }
        missing
    }
}

impl FromIterator<Layer> for LayerSet {
    fn from_iter<T: IntoIterator<Item = Layer>>(layers: T) -> Self {
        layers.into_iter().fold(Self::NONE, Self::with)
    }
}

impl From<Vec<Layer>> for LayerSet {
    fn from(layers: Vec<Layer>) -> Self {
        layers.into_iter().collect()
    }
}

impl From<LayerSet> for Vec<Layer> {
    fn from(layers: LayerSet) -> Self {
        layers.iter().collect()
    }
}

impl fmt::Display for LayerSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<_> = self.iter().map(Layer::as_str).collect();
        f.write_str(if names.is_empty() { "none" } else { "" })?;
        f.write_str(&names.join("+"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn enough_is_process_limits_seccomp_and_a_view_of_files() {
        let base: LayerSet = [Layer::Process, Layer::Limits, Layer::Seccomp].into_iter().collect();
        assert_eq!(base.missing(), ["one of namespaces and landlock"]);
        for view in [Layer::Namespaces, Layer::Landlock] {
            assert!(base.with(view).missing().is_empty());
            for needed in base.iter() {
                assert_eq!(base.with(view).without(needed).missing(), [needed.as_str()]);
            }
        }
        assert_eq!(LayerSet::NONE.missing().len(), 4);
        assert!(LayerSet::all().missing().is_empty());
    }

    #[test]
    fn sets_read_and_travel_as_lists_of_names() {
        let set: LayerSet = [Layer::Seccomp, Layer::Process].into_iter().collect();
        assert_eq!((set.to_string().as_str(), LayerSet::NONE.to_string().as_str()), ("process+seccomp", "none"));
        let text = serde_json::to_string(&set).unwrap();
        assert_eq!(text, r#"["process","seccomp"]"#);
        assert_eq!(serde_json::from_str::<LayerSet>(&text).unwrap(), set);
        assert_eq!(set.both(LayerSet::NONE.with(Layer::Seccomp)).iter().collect::<Vec<_>>(), [Layer::Seccomp]);
    }
}
