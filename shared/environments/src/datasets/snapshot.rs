//! Which files of a snapshot hold which rows.

use std::collections::BTreeMap;
use std::path::Path;

use regex::Regex;
use saphyr::{LoadableYamlNode, Yaml};

use super::published::Part;

/// How deep folders are listed; a file lies in the folder of its configuration.
const MAX_DEPTH: usize = 3;

/// Names of the files that hold `part` among `names`, in order: shards of the configuration's own folder, or what the head of
/// the snapshot's `readme` names.
///
/// # Errors
/// Why there are none, in words.
pub(super) fn files_of(names: &[String], readme: Option<&str>, part: &Part) -> Result<Vec<String>, String> {
    let start = format!("{}/{}-", part.config, part.split);
    let direct = names.iter().filter(|name| name.starts_with(&start) && name.ends_with(".parquet"));
    if let Some(found) = all_shards(direct)? {
        return Ok(found);
    }
    let Some(readme) = readme else { return Err(format!("no {start}*.parquet and no README.md that names another")) };
    let patterns = patterns_of(readme, part);
    let is_named = |name: &&String| patterns.iter().any(|pattern| pattern.is_match(name));
    all_shards(names.iter().filter(is_named))?
        .ok_or_else(|| format!("no {start}*.parquet, nor what README.md names for {part}"))
}

/// `names` in order if they are all shards of one file; `None` if there are no names.
fn all_shards<'n>(names: impl Iterator<Item = &'n String>) -> Result<Option<Vec<String>>, String> {
    let mut found: Vec<String> = names.cloned().collect();
    found.sort();
    let Some(first) = found.first() else { return Ok(None) };
    if let Some((_, count)) = shard(first) {
        let is_complete =
            found.len() == count && found.iter().enumerate().all(|(place, name)| shard(name) == Some((place, count)));
        if !is_complete {
            return Err(format!("of the {count} shards of {first} there are {}", found.len()));
        }
    }
    Ok(Some(found))
}

/// Place and number of shards in a name such as `train-00000-of-00002.parquet`.
fn shard(name: &str) -> Option<(usize, usize)> {
    let stem = name.rsplit_once('.')?.0;
    let (rest, count) = stem.rsplit_once("-of-")?;
    let (_, place) = rest.rsplit_once('-')?;
    Some((place.parse().ok()?, count.parse().ok()?))
}

/// Patterns of file names that the YAML head of `readme` gives for `part`; none where it has no such head.
fn patterns_of(readme: &str, part: &Part) -> Vec<Regex> {
    let header = readme.strip_prefix("---").and_then(|rest| rest.split_once("\n---")).map(|(header, _)| header);
    let documents = header.and_then(|header| Yaml::load_from_str(header).ok()).unwrap_or_default();
    let Some(configs) = documents.first().and_then(|head| head.as_mapping_get("configs")).and_then(Yaml::as_vec) else {
        return Vec::new();
    };
    let text = |node: &Yaml<'_>, key: &str| Some(node.as_mapping_get(key)?.as_str()?.to_owned());
    let of_config = configs.iter().filter(|config| text(config, "config_name").as_deref() == Some(part.config));
    let files = of_config.filter_map(|config| config.as_mapping_get("data_files")?.as_vec()).flatten();
    let of_split = files.filter(|file| text(file, "split").as_deref() == Some(part.split.as_str()));
    let paths = of_split.filter_map(|file| file.as_mapping_get("path")).flat_map(|path| match path.as_vec() {
        Some(paths) => paths.iter().filter_map(Yaml::as_str).collect::<Vec<_>>(),
        None => path.as_str().into_iter().collect(),
    });
    paths.filter_map(glob).collect()
}

/// `*` within a folder, `**` across folders, `?` for one character.
fn glob(pattern: &str) -> Option<Regex> {
    let escaped = regex::escape(pattern);
    let body =
        escaped.replace(r"\*\*/", "(?:.*/)?").replace(r"\*\*", ".*").replace(r"\*", "[^/]*").replace(r"\?", "[^/]");
    Regex::new(&format!("^{body}$")).ok()
}

/// Names of the files below `folder`, with `/` between folders; links are followed, those that lead nowhere left out.
pub(super) fn list(folder: &Path) -> Vec<String> {
    let mut names = BTreeMap::new();
    collect(folder, "", MAX_DEPTH, &mut names);
    names.into_keys().collect()
}

fn collect(folder: &Path, prefix: &str, depth: usize, names: &mut BTreeMap<String, ()>) {
    let Ok(entries) = std::fs::read_dir(folder) else { return };
    for entry in entries.flatten() {
        let Ok(name) = entry.file_name().into_string() else { continue };
        let (path, name) = (entry.path(), format!("{prefix}{name}"));
        if path.is_file() {
            names.insert(name, ());
        } else if depth > 1 && path.is_dir() {
            collect(&path, &format!("{name}/"), depth - 1, names);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::datasets::published::parts;
    use crate::{EnvironmentId, Split};

    fn part() -> Part {
        parts(EnvironmentId::Gsm8k, Split::Train).unwrap().remove(0)
    }

    fn names(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    #[test]
    fn shards_of_the_configuration_come_first() {
        let present = [
            "main/train-00001-of-00002.parquet",
            "main/train-00000-of-00002.parquet",
            "socratic/train-00000-of-00001.parquet",
        ];
        let found = files_of(&names(&present), None, &part()).unwrap();
        assert_eq!(found, ["main/train-00000-of-00002.parquet", "main/train-00001-of-00002.parquet"]);
        for missing in
            [&present[..1], &present[1..], &["main/train-00000-of-00001.jsonl", "main/test-00000-of-00001.parquet"]]
        {
            assert!(files_of(&names(missing), None, &part()).is_err(), "{missing:?}");
        }
        let two_versions = ["main/train-00000-of-00001.parquet", "main/train-00000-of-00002.parquet"];
        assert!(files_of(&names(&two_versions), None, &part()).unwrap_err().contains("shards"));
    }

    #[test]
    fn older_layouts_are_named_by_the_readme() {
        let readme = "---\nlicense: mit\nconfigs:\n- config_name: socratic\n  data_files:\n  - split: train\n    path: s/*\n\
             - config_name: main\n  data_files:\n  - split: test\n    path: data/test-*\n  - split: train\n    path:\n    - \
             data/train-*\n    - more/**/*.parquet\n---\n# GSM8K\n";
        let present =
            names(&["data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet", "s/x", "README.md"]);
        assert_eq!(files_of(&present, Some(readme), &part()).unwrap(), ["data/train-00000-of-00001.parquet"]);
        let present = names(&["more/a/b.parquet", "more/c.parquet", "more/c.txt"]);
        assert_eq!(files_of(&present, Some(readme), &part()).unwrap(), ["more/a/b.parquet", "more/c.parquet"]);
        for other in
            ["", "# no head", "---\nconfigs: 3\n---\n", "---\n\t{\n---\n", "---\nconfigs:\n- config_name: main\n---\n"]
        {
            assert!(files_of(&present, Some(other), &part()).is_err(), "{other:?}");
        }
    }
}
