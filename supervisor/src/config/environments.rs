//! Where data sets and evaluators come from.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::PathBuf;

use grail_environments::EnvironmentId;
use grail_environments::datasets::{
    DatasetSettings, HubSettings, Overrides, SourceSettings, override_variable, path_variable, revision_variable,
};
use grail_environments::pool::UNSAFE_VARIABLE;
use grail_environments::sandbox::setup::Installation;

use super::origin::Sourced;
use super::resolve::{Resolver, boolean, integer, plainly, text};

/// Data sets and evaluators.
#[derive(Debug, Clone)]
pub struct EnvironmentsConfig {
    /// What is configured by environment.
    pub sources: BTreeMap<EnvironmentId, SourceSettings>,
    /// Folder with the interpreter; `None`: in this user's cache.
    pub evaluator_folder: Sourced<Option<PathBuf>>,
    /// Interpreters of each kind, two at least: a second run of a program needs another one. `None`: by the cores.
    pub evaluators: Sourced<Option<usize>>,
    /// Programs of a model run although the sandbox lacks a part that is required.
    pub is_unsafe_accepted: Sourced<bool>,
}

impl EnvironmentsConfig {
    pub(super) fn resolve(resolver: &mut Resolver) -> Self {
        let mut sources: BTreeMap<EnvironmentId, SourceSettings> = BTreeMap::new();
        for environment in EnvironmentId::ALL {
            sources.entry(environment).or_default().path = resolver.folder(path_variable(environment)).value;
        }
        for environment in EnvironmentId::ALL {
            let revision = resolver.optional(revision_variable(environment), text, String::clone).value;
            sources.entry(environment).or_default().revision = revision;
        }
        for environment in EnvironmentId::ALL {
            let given = resolver.optional(override_variable(environment), overrides, |(text, _)| text.clone());
            sources.entry(environment).or_default().overrides = given.value.map(|(_, named)| named).unwrap_or_default();
        }
        Self {
            sources,
            evaluator_folder: evaluator_folder(resolver),
            evaluators: resolver.optional("GRAIL_EVALUATORS", integer(2, 256), plainly),
            is_unsafe_accepted: resolver.value(UNSAFE_VARIABLE, boolean, plainly),
        }
    }

    /// Where to look for data sets, on a host with the variables of `lookup`.
    #[must_use]
    pub fn datasets(&self, lookup: impl Fn(&str) -> Option<OsString>) -> DatasetSettings {
        DatasetSettings { hub: HubSettings::from_variables(lookup), sources: self.sources.clone() }
    }
}

fn evaluator_folder(resolver: &mut Resolver) -> Sourced<Option<PathBuf>> {
    let named = resolver.folder("GRAIL_EVALUATOR_DIR");
    let cache = resolver.folder("GRAIL_BUILD_CACHE_DIR");
    if named.value.is_some() {
        return named;
    }
    cache.map(|cache| cache.map(|cache| Installation::in_cache(&cache).folder().to_owned()))
}

fn overrides(text: &str) -> Result<(String, Overrides), String> {
    let named = text.parse::<Overrides>();
    let named = named.map_err(|_| "SPLIT=ROWS:FINGERPRINT, several with commas between".to_owned())?;
    Ok((text.to_owned(), named))
}
