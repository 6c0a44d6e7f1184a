//! Where to look for data sets.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::PathBuf;

use super::fingerprint::Overrides;
use crate::id::EnvironmentId;

/// Where data sets are downloaded from when `HF_ENDPOINT` says nothing else.
pub const DEFAULT_ENDPOINT: &str = "https://huggingface.co";

/// Variable that names a file or folder with an environment's rows.
#[must_use]
pub const fn path_variable(environment: EnvironmentId) -> &'static str {
    match environment {
        EnvironmentId::Gsm8k => "GRAIL_DATASET_PATH_GSM8K",
        EnvironmentId::Math => "GRAIL_DATASET_PATH_MATH",
        EnvironmentId::Mbpp => "GRAIL_DATASET_PATH_MBPP",
        EnvironmentId::HumanEval => "GRAIL_DATASET_PATH_HUMANEVAL",
    }
}

/// Variable that pins an environment's data set to a commit, tag or branch of the hub.
#[must_use]
pub const fn revision_variable(environment: EnvironmentId) -> &'static str {
    match environment {
        EnvironmentId::Gsm8k => "GRAIL_DATASET_REVISION_GSM8K",
        EnvironmentId::Math => "GRAIL_DATASET_REVISION_MATH",
        EnvironmentId::Mbpp => "GRAIL_DATASET_REVISION_MBPP",
        EnvironmentId::HumanEval => "GRAIL_DATASET_REVISION_HUMANEVAL",
    }
}

/// Variable that names row counts and fingerprints other than the published ones, in the form of [`Overrides`].
#[must_use]
pub const fn override_variable(environment: EnvironmentId) -> &'static str {
    match environment {
        EnvironmentId::Gsm8k => "GRAIL_DATASET_OVERRIDE_GSM8K",
        EnvironmentId::Math => "GRAIL_DATASET_OVERRIDE_MATH",
        EnvironmentId::Mbpp => "GRAIL_DATASET_OVERRIDE_MBPP",
        EnvironmentId::HumanEval => "GRAIL_DATASET_OVERRIDE_HUMANEVAL",
    }
}

/// What is configured for one environment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SourceSettings {
    /// File or folder that is looked at first; see [`path_variable`].
    pub path: Option<PathBuf>,
    /// Commit, tag or branch on the hub, `main` if absent; see [`revision_variable`].
    pub revision: Option<String>,
    /// Files other than the published ones; see [`override_variable`].
    pub overrides: Overrides,
}

/// Caches and address of the hub, by the variables that its Python tools use.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HubSettings {
    /// `HF_HUB_CACHE`, else `hub` in `HF_HOME`; `None` if there is no home folder either.
    pub cache: Option<PathBuf>,
    /// `HF_DATASETS_CACHE`, else `datasets` in `HF_HOME`.
    pub library_cache: Option<PathBuf>,
    /// `HF_ENDPOINT`, without a slash at its end.
    pub endpoint: String,
    /// `HF_HUB_OFFLINE`: nothing is downloaded.
    pub is_offline: bool,
}

impl HubSettings {
    /// Reads the variables through `lookup`; empty ones count as absent.
    #[must_use]
    pub fn from_variables(lookup: impl Fn(&str) -> Option<OsString>) -> Self {
        let variable = |name: &str| lookup(name).filter(|value| !value.is_empty());
        let folder = |name: &str| variable(name).map(PathBuf::from);
        let general_cache = || folder("XDG_CACHE_HOME").or_else(|| Some(folder("HOME")?.join(".cache")));
        let home = folder("HF_HOME").or_else(|| Some(general_cache()?.join("huggingface")));
        let within = |name: &str| home.as_ref().map(|home| home.join(name));
        let text = |name: &str| variable(name).and_then(|value| value.into_string().ok());
        let endpoint = text("HF_ENDPOINT").unwrap_or_else(|| DEFAULT_ENDPOINT.to_owned());
        let offline = text("HF_HUB_OFFLINE").unwrap_or_default().to_ascii_uppercase();
        Self {
            cache: folder("HF_HUB_CACHE").or_else(|| within("hub")),
            library_cache: folder("HF_DATASETS_CACHE").or_else(|| within("datasets")),
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            is_offline: ["1", "ON", "YES", "TRUE"].contains(&offline.as_str()),
        }
    }
}

impl HubSettings {
    /// The endpoint without user and password, for messages.
    #[must_use]
    pub fn shown_endpoint(&self) -> String {
        let Some((scheme, rest)) = self.endpoint.split_once("://") else { return self.endpoint.clone() };
        let (authority, path) = rest.split_at(rest.find('/').unwrap_or(rest.len()));
        let host = authority.rsplit_once('@').map_or(authority, |(_, host)| host);
        format!("{scheme}://{host}{path}")
    }
}

/// Where to look for every data set.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DatasetSettings {
    /// Caches and address of the hub.
    pub hub: HubSettings,
    /// What is configured by environment.
    pub sources: BTreeMap<EnvironmentId, SourceSettings>,
}

impl DatasetSettings {
    /// What is configured for `environment`.
    #[must_use]
    pub fn source(&self, environment: EnvironmentId) -> SourceSettings {
        self.sources.get(&environment).cloned().unwrap_or_default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(variables: &[(&str, &str)]) -> HubSettings {
        HubSettings::from_variables(|name| {
            variables.iter().find(|(known, _)| *known == name).map(|(_, value)| OsString::from(value))
        })
    }

    #[test]
    fn folders_follow_the_variables_of_the_hub() {
        let folders = |variables: &[(&str, &str)]| {
            let settings = settings(variables);
            [settings.cache, settings.library_cache].map(|folder| folder.map(|path| path.display().to_string()))
        };
        let some = |text: &str| Some(text.to_owned());
        assert_eq!(folders(&[]), [None, None]);
        let home = ("HOME", "/h");
        assert_eq!(folders(&[home]), [some("/h/.cache/huggingface/hub"), some("/h/.cache/huggingface/datasets")]);
        let general = ("XDG_CACHE_HOME", "/x");
        assert_eq!(folders(&[home, general]), [some("/x/huggingface/hub"), some("/x/huggingface/datasets")]);
        let own = [home, general, ("HF_HOME", "/f")];
        assert_eq!(folders(&own), [some("/f/hub"), some("/f/datasets")]);
        let each = [home, ("HF_HOME", ""), ("HF_HUB_CACHE", "/a"), ("HF_DATASETS_CACHE", "/b")];
        assert_eq!(folders(&each), [some("/a"), some("/b")]);
    }

    #[test]
    fn offline_and_endpoint() {
        for (value, is_offline) in
            [("1", true), ("on", true), ("True", true), ("0", false), ("", false), ("off", false)]
        {
            assert_eq!(settings(&[("HF_HUB_OFFLINE", value)]).is_offline, is_offline, "{value}");
        }
        assert_eq!(settings(&[]).endpoint, DEFAULT_ENDPOINT);
        assert_eq!(settings(&[("HF_ENDPOINT", "http://mirror/hub/")]).endpoint, "http://mirror/hub");
    }

    #[test]
    fn messages_name_no_user_and_no_password() {
        for (endpoint, shown) in [
            ("http://me:secret@mirror:1/hub", "http://mirror:1/hub"),
            ("http://me@secret@mirror", "http://mirror"),
            ("http://mirror/a@b", "http://mirror/a@b"),
            ("mirror", "mirror"),
        ] {
            assert_eq!(settings(&[("HF_ENDPOINT", endpoint)]).shown_endpoint(), shown);
        }
    }

    #[test]
    fn variables_end_in_the_environment() {
        for environment in EnvironmentId::ALL {
            let name = environment.as_str().to_uppercase();
            for variable in [path_variable, revision_variable, override_variable] {
                assert!(variable(environment).starts_with("GRAIL_DATASET_") && variable(environment).ends_with(&name));
            }
        }
    }
}
