//! What was written, and where, before anything is understood: the process environment over a `.env` file, options over both.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::io;
use std::path::{Path, PathBuf};

use grail_telemetry::SecretString;

use super::dotenv;
use super::origin::{Origin, Sourced};
use super::problem::{Problem, Warning};
use super::resolve::{boolean, shown_url};
use super::variables::{Alias, Standing, Variable, all, find, known_name, nearest};

/// The file that is read from the working directory.
pub const ENV_FILE: &str = ".env";
/// Beginnings of names that are ours alone: others with them are probably misspelt.
const OWN_PREFIXES: [&str; 2] = ["GRAIL_", "R2_"];

/// Which file is read beside the environment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EnvFile {
    /// `.env` in this folder, if it exists.
    InFolder(PathBuf),
    /// A file that must exist.
    Named(PathBuf),
}

/// An option of the command line that stands for a variable.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FlagValue {
    pub variable: &'static str,
    pub flag: &'static str,
    pub value: String,
}

/// Everything that a configuration is made from.
#[derive(Debug, Clone)]
pub struct Inputs {
    pub environment: Vec<(OsString, OsString)>,
    pub env_file: EnvFile,
    pub flags: Vec<FlagValue>,
}

impl Inputs {
    /// The process environment and `.env` of the working directory, or `env_file`.
    #[must_use]
    pub fn from_process(env_file: Option<PathBuf>, flags: Vec<FlagValue>) -> Self {
        let env_file = env_file.map_or_else(|| EnvFile::InFolder(PathBuf::new()), EnvFile::Named);
        Self { environment: std::env::vars_os().collect(), env_file, flags }
    }
}

/// All values that were given, none of them checked. Any of them may be a secret, so `Debug` shows none.
#[derive(Debug, Clone, Default)]
pub(super) struct RawConfig {
    values: BTreeMap<&'static str, Sourced<SecretString>>,
    /// Variables of other programs from the file, for child processes.
    pub passthrough: BTreeMap<String, String>,
    /// `HOME` and the folders of the XDG specification.
    pub base_folders: BTreeMap<String, PathBuf>,
    pub warnings: Vec<Warning>,
    pub problems: Vec<Problem>,
}

impl RawConfig {
    pub(super) fn read(inputs: &Inputs) -> Self {
        let mut raw = Self::default();
        raw.read_file(inputs);
        raw.read_environment(inputs);
        for flag in &inputs.flags {
            let value = SecretString::new(flag.value.clone());
            raw.values.insert(flag.variable, Sourced { value, origin: Origin::Flag { name: flag.flag } });
        }
        raw
    }

    /// The value that counts for a variable, with the name under which it was written. Blank counts as unset.
    pub(super) fn value(&self, variable: &Variable) -> Option<(&'static str, &str, &Origin)> {
        let first = variable.aliases.iter().filter(|alias| matches!(alias, Alias::First(_)));
        let last = variable.aliases.iter().filter(|alias| matches!(alias, Alias::Misspelt(_)));
        let flag =
            self.values.get_key_value(variable.name).filter(|(_, value)| matches!(value.origin, Origin::Flag { .. }));
        let names = first.map(|alias| alias.name()).chain([variable.name]).chain(last.map(|alias| alias.name()));
        let written = names.filter_map(|name| self.values.get_key_value(name));
        let mut candidates = flag.into_iter().chain(written);
        candidates.find_map(|(name, value)| {
            let text = value.value.expose().trim();
            (!text.is_empty()).then_some((*name, text, &value.origin))
        })
    }

    fn read_file(&mut self, inputs: &Inputs) {
        let (path, must_exist) = match &inputs.env_file {
            EnvFile::InFolder(folder) => (folder.join(ENV_FILE), false),
            EnvFile::Named(path) => (path.clone(), true),
        };
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound && !must_exist => return,
            Err(error) => return self.problems.push(unreadable(&path, &error)),
        };
        let environment = inputs.environment.iter();
        let environment =
            environment.filter_map(|(name, value)| Some((name.to_str()?.to_owned(), value.to_str()?.to_owned())));
        let environment: BTreeMap<String, String> = environment.collect();
        let (assignments, malformed) = dotenv::parse(&text, &environment);
        for defect in malformed {
            self.problems.push(Problem {
                variable: "",
                value: None,
                origin: Origin::File { path: path.clone(), line: defect.line },
                what: format!("malformed statement: {}", defect.what),
                remedy: "write NAME=value, with quotes around values that contain a # or a quote".to_owned(),
            });
        }
        let mut lines: BTreeMap<String, usize> = BTreeMap::new();
        for assignment in assignments {
            let origin = Origin::File { path: path.clone(), line: assignment.line };
            if let Some(earlier) = lines.insert(assignment.name.clone(), assignment.line) {
                let text = format!("set again; the value of line {earlier} is not used");
                self.warnings.push(Warning { variable: assignment.name.clone(), origin: origin.clone(), text });
            }
            self.take_from_file(assignment, origin, &environment);
        }
    }

    fn take_from_file(
        &mut self,
        assignment: dotenv::Assignment,
        origin: Origin,
        environment: &BTreeMap<String, String>,
    ) {
        match known_name(&assignment.name) {
            Some(name) => {
                self.values.insert(name, Sourced { value: SecretString::new(assignment.value), origin });
            }
            None => {
                self.warn_of_unknown(&assignment.name, origin);
                if !environment.contains_key(&assignment.name) {
                    self.passthrough.insert(assignment.name, assignment.value);
                }
            }
        }
    }

    fn read_environment(&mut self, inputs: &Inputs) {
        for (name, value) in &inputs.environment {
            let Some(name) = name.to_str() else { continue };
            if name == "HOME" || name.starts_with("XDG_") {
                self.base_folders.insert(name.to_owned(), PathBuf::from(value));
            }
            // For children, which read it themselves; no setting of a miner.
            if name == grail_process::fault::VARIABLE {
                continue;
            }
            let Some(known) = known_name(name) else {
                // The unknown ones of the environment carry no static name; the warning says where they are.
                self.warn_of_unknown(name, Origin::Env { name: "" });
                continue;
            };
            let origin = Origin::Env { name: known };
            match value.to_str() {
                Some(value) => {
                    self.values.insert(known, Sourced { value: SecretString::new(value.to_owned()), origin });
                }
                None => self.problems.push(Problem {
                    variable: known,
                    value: Some(shown_url(value.to_string_lossy())).filter(|_| !is_secret(known)),
                    origin,
                    what: "the value is no UTF-8".to_owned(),
                    remedy: "set it to plain text".to_owned(),
                }),
            }
        }
    }

    fn warn_of_unknown(&mut self, name: &str, origin: Origin) {
        if !OWN_PREFIXES.iter().any(|prefix| name.starts_with(prefix)) {
            return;
        }
        let text = match nearest(name) {
            Some(known) => format!("no such variable; did you mean {known}?"),
            None => "no such variable; it is ignored".to_owned(),
        };
        self.warnings.push(Warning { variable: name.to_owned(), origin, text });
    }

    /// Warnings about names that were used although another one is meant, or that change nothing.
    pub(super) fn warn_of_names(&mut self) {
        let mut warnings = Vec::new();
        for variable in all() {
            let Some((written, text, origin)) = self.value(variable) else { continue };
            let warn = |text: String| Warning { variable: written.to_owned(), origin: origin.clone(), text };
            if let Standing::NoEffect { why, harmless } = variable.standing
                && (harmless.is_none() || boolean(text).ok() != harmless)
            {
                warnings.push(warn(why.to_owned()));
            }
            let misspelt = variable.aliases.contains(&Alias::Misspelt(written));
            if misspelt {
                warnings.push(warn(format!("read as {}, which is the variable's name", variable.name)));
            }
            if variable.name == "GRAIL_MONITORING_BACKEND" && text == "wandb" {
                warnings.push(warn("this version sends no metrics anywhere".to_owned()));
            }
        }
        self.warnings.extend(warnings);
    }
}

fn is_secret(name: &str) -> bool {
    find(name).is_some_and(|variable| variable.secret)
}

fn unreadable(path: &Path, error: &io::Error) -> Problem {
    let remedy = match error.kind() {
        io::ErrorKind::NotFound => "name an existing file with --env-file",
        io::ErrorKind::PermissionDenied => "make the file readable for this user",
        io::ErrorKind::InvalidData => "save the file as UTF-8 text",
        _ => "check the file and its folder",
    };
    Problem {
        variable: "",
        value: None,
        origin: Origin::File { path: path.to_path_buf(), line: 0 },
        what: format!("the file cannot be read: {error}"),
        remedy: remedy.to_owned(),
    }
}
