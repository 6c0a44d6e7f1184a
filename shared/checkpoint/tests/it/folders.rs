//! Model folders of tests: written from bytes, read back, and brought up to date by a change set.

use std::collections::BTreeMap;
use std::path::Path;

use grail_checkpoint::{ChangeSet, Shapes, WeightsFiles};

/// A tensor in memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tensor {
    /// As safetensors spells it.
    pub dtype: String,
    pub shape: Vec<u64>,
    pub bytes: Vec<u8>,
}

pub type Tensors = BTreeMap<String, Tensor>;

impl Tensor {
    pub fn width(&self) -> usize {
        if self.dtype == "F32" { 4 } else { 2 }
    }

    /// Positions and bits of the elements that differ in another tensor of the same form.
    pub fn differences(&self, other: &Self) -> Vec<(u64, Vec<u8>)> {
        let width = self.width();
        let pairs = self.bytes.chunks(width).zip(other.bytes.chunks(width));
        let different = (0..).zip(pairs).filter(|(_, (old, new))| old != new);
        different.map(|(position, (_, new))| (position, new.to_vec())).collect()
    }
}

/// Writes a weights file with the tensors in the given order.
pub fn write_file<'a>(path: &Path, tensors: impl IntoIterator<Item = (&'a String, &'a Tensor)>) {
    let mut header = serde_json::Map::new();
    let mut data = Vec::new();
    for (name, tensor) in tensors {
        let start = data.len();
        data.extend_from_slice(&tensor.bytes);
        let entry =
            serde_json::json!({"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": [start, data.len()]});
        header.insert(name.clone(), entry);
    }
    let header = serde_json::to_vec(&header).unwrap();
    std::fs::write(path, [(header.len() as u64).to_le_bytes().as_slice(), &header, &data].concat()).unwrap();
}

/// A folder with all tensors in one file.
pub fn write_folder(tensors: &Tensors) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    write_file(&folder.path().join("model.safetensors"), tensors);
    folder
}

pub fn read_tensors(weights: &WeightsFiles) -> Tensors {
    let shapes = Shapes::from(weights);
    let names = weights.tensors().keys();
    names
        .map(|name| {
            let shape = shapes.get(name).unwrap();
            let bytes = weights.read(name).unwrap().unwrap();
            (name.clone(), Tensor { dtype: shape.dtype.clone(), shape: shape.shape.clone(), bytes })
        })
        .collect()
}

/// What a change set says, by tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    Elements(Vec<(u64, Vec<u8>)>),
    Whole(Tensor),
}

/// Reads the file of a change set as any reader of safetensors would.
pub fn read_changes(changes: &ChangeSet) -> BTreeMap<String, Change> {
    let file = WeightsFiles::open_file(&changes.file).unwrap();
    let tensors = read_tensors(&file);
    let mut result = BTreeMap::new();
    for (key, tensor) in &tensors {
        let (kind, name) = key.split_once('/').unwrap();
        let change = match kind {
            "whole" => Change::Whole(tensor.clone()),
            "value" => continue,
            "index" => {
                let values = &tensors[&format!("value/{name}")];
                assert_eq!((tensor.dtype.as_str(), &tensor.shape), ("U32", &values.shape), "{name}");
                let positions = tensor.bytes.chunks(4).map(|chunk| u32::from_le_bytes(chunk.try_into().unwrap()));
                let values = values.bytes.chunks(values.width()).map(<[u8]>::to_vec);
                Change::Elements(positions.map(u64::from).zip(values).collect())
            }
            other => panic!("{other} of {name} is unknown"),
        };
        result.insert(name.to_owned(), change);
    }
    assert_eq!(tensors.keys().filter(|key| key.starts_with("value/")).count(), elements_entries(&result));
    result
}

fn elements_entries(changes: &BTreeMap<String, Change>) -> usize {
    changes.values().filter(|change| matches!(change, Change::Elements(_))).count()
}

/// Asserts that a change set leads from `old` to `new`, in the right form for each tensor, and counts what it says.
pub fn assert_changes(changes: &ChangeSet, old: &Tensors, new: &Tensors) {
    let found = read_changes(changes);
    let mut changed = 0;
    for (name, tensor) in old {
        let differences = tensor.differences(&new[name]);
        changed += differences.len() as u64;
        let elements = tensor.bytes.len() / tensor.width();
        let expected = match differences.len() {
            0 => None,
            many if many * 3 > elements => Some(Change::Whole(new[name].clone())),
            _ => Some(Change::Elements(differences)),
        };
        assert_eq!(found.get(name), expected.as_ref(), "{name}");
    }
    assert!(found.keys().all(|name| old.contains_key(name)));
    assert_eq!(changes.changed, changed);
    let elements = old.values().map(|tensor| tensor.shape.iter().product::<u64>()).sum::<u64>();
    assert_eq!(changes.elements, elements);
}
