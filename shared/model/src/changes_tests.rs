//! Checksums and changes on the golden models: fused, tied and untied, held as in their files and widened.

use std::path::{Path, PathBuf};

use grail_protocol::ids::WeightsHash;
use serde::Deserialize;
use tempfile::TempDir;

use crate::checksum::{Checksums, of_bytes};
use crate::error::{ChangeError, ChecksumError};
use crate::safetensors::{FileDtype, OwnedTensor, write};
use crate::weights::WeightFiles;
use crate::{Changes, Device, Dtype, INDEX_DTYPE, LoadOptions, Model, Undo, ffi, write_difference};

const DTYPES: [Dtype; 2] = [Dtype::Bf16, Dtype::F32];

#[derive(Deserialize)]
struct Index {
    models: Vec<IndexEntry>,
}

#[derive(Deserialize)]
struct IndexEntry {
    dir: String,
}

fn golden_models() -> Vec<PathBuf> {
    let index: Index = grail_golden::json("models/index.json");
    let models: Vec<PathBuf> =
        index.models.iter().map(|entry| grail_golden::path(&format!("models/{}", entry.dir))).collect();
    assert_eq!(models.len(), 6);
    models
}

fn load(folder: &Path, dtype: Dtype) -> Model {
    load_on(Device::Cpu, folder, dtype)
}

fn load_on(device: Device, folder: &Path, dtype: Dtype) -> Model {
    Model::load(folder, &LoadOptions::on(device).with_dtype(dtype)).unwrap()
}

/// The bits of all weights as they are held, end to end.
fn bits(model: &Model) -> Vec<u8> {
    let places = model.network().places().unwrap();
    let on_host = |place: &tch::Tensor| place.to_device(tch::Device::Cpu);
    places.values().flat_map(|place| ffi::host_bytes(&on_host(place)).unwrap().to_vec()).collect()
}

fn naive(bytes: &[u8], dtype: FileDtype) -> u64 {
    let mut sum = 0_u64;
    for (index, element) in bytes.chunks_exact(dtype.element_bytes()).enumerate() {
        let bits = element.iter().rev().fold(0_u64, |bits, byte| bits << 8 | u64::from(*byte));
        sum = sum.wrapping_add((bits + 1).wrapping_mul(2 * index as u64 + 1));
    }
    sum
}

/// A checkpoint beside a golden one, in `dtype`, with other elements, and the changes that lead there.
struct Step {
    base: PathBuf,
    target: PathBuf,
    changes: PathBuf,
    changed: u64,
    _folder: TempDir,
}

impl Step {
    fn new(golden: &Path, dtype: FileDtype) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (base, target) = (folder.path().join("base"), folder.path().join("target"));
        let files = WeightFiles::open(golden).unwrap();
        for (place, path) in [&base, &target].into_iter().enumerate() {
            std::fs::create_dir(path).unwrap();
            std::fs::copy(golden.join("config.json"), path.join("config.json")).unwrap();
            let tensors: Vec<OwnedTensor> = files
                .iter()
                .enumerate()
                .map(|(number, (name, view))| {
                    let mut bytes = in_dtype(view.bytes, dtype);
                    if place == 1 {
                        change(number, &mut bytes, dtype);
                    }
                    OwnedTensor { name: name.to_owned(), dtype, shape: view.shape.to_vec(), bytes }
                })
                .collect();
            write(&path.join("model.safetensors"), &tensors).unwrap();
        }
        let changes = folder.path().join("from-0.bin");
        let open = |path: &Path| WeightFiles::open(path).unwrap();
        let changed = write_difference(&open(&base), &open(&target), &changes).unwrap();
        Self { base, target, changes, changed, _folder: folder }
    }

    fn checksums(&self) -> Checksums {
        WeightFiles::open(&self.target).unwrap().checksums()
    }
}

fn in_dtype(bf16: &[u8], dtype: FileDtype) -> Vec<u8> {
    let values = bf16.as_chunks().0.iter().map(|bytes| half::bf16::from_le_bytes(*bytes).to_f32());
    match dtype {
        FileDtype::F32 => values.flat_map(f32::to_le_bytes).collect(),
        FileDtype::F16 => values.flat_map(|value| half::f16::from_f32(value).to_le_bytes()).collect(),
        _ => bf16.to_vec(),
    }
}

/// One tensor in five stays, one is changed in every element, the others here and there, at both ends too.
fn change(number: usize, bytes: &mut [u8], dtype: FileDtype) {
    let width = dtype.element_bytes();
    let count = bytes.len() / width;
    let every = match number % 5 {
        0 => return,
        1 => 1,
        _ => 7,
    };
    for (index, element) in bytes.chunks_exact_mut(width).enumerate() {
        if index % every == 0 || index + 1 == count {
            // The sign and the lowest bit of the mantissa: a number stays one.
            element[0] ^= 1;
            element[width - 1] ^= 0x80;
        }
    }
}

#[test]
fn checksums_of_weights_are_those_of_their_files() {
    for folder in golden_models() {
        let files = WeightFiles::open(&folder).unwrap();
        let expected: Checksums =
            files.iter().map(|(name, view)| (name.to_owned(), naive(view.bytes, view.dtype))).collect();
        assert_eq!(files.checksums(), expected);
        let one = files.iter().next().unwrap().1;
        assert_eq!(of_bytes(one.bytes, one.dtype), *expected.values().next().unwrap());
        for dtype in DTYPES {
            let model = load(&folder, dtype);
            assert_eq!(model.checksums().unwrap(), expected, "{} {dtype}", folder.display());
            model.compare(&expected).unwrap();
        }
    }
}

#[test]
fn changes_lead_to_what_loading_the_target_gives_and_back() {
    for golden in golden_models() {
        for (file, held) in EXACT {
            let step = Step::new(&golden, file);
            assert!(step.changed > 1_000);
            let (mut model, target) = (load(&step.base, held), load(&step.target, held));
            let (before, checksums) = (bits(&model), step.checksums());
            let from_folder = Changes::from_folder(&step.target, &model).unwrap();
            for changes in [Changes::open(&step.changes, &model).unwrap(), from_folder] {
                let hash = model.weights_hash();
                let mut undo = Undo::default();
                model.apply(&changes, Some(&mut undo)).unwrap();
                assert_eq!(bits(&model), bits(&target), "{} {} {held}", golden.display(), file.name());
                model.compare(&checksums).unwrap();
                assert_eq!(model.weights_hash(), hash);
                model.revert(&changes, undo).unwrap();
                assert_eq!(bits(&model), before);
                model.compare(&checksums).unwrap_err();
            }
            let changes = Changes::open(&step.changes, &model).unwrap();
            let mut shadow = model.copy().unwrap();
            shadow.apply(&changes, None).unwrap();
            let (wrong, right) = (WeightsHash(1), target.weights_hash());
            let base = WeightFiles::open(&step.base).unwrap().checksums();
            assert!(matches!(shadow.confirm(wrong, &base), Err(ChecksumError::Differs { .. })));
            assert_eq!(shadow.weights_hash(), model.weights_hash());
            shadow.confirm(right, &checksums).unwrap();
            assert_eq!((shadow.weights_hash(), bits(&shadow)), (right, bits(&target)));
            assert_eq!(bits(&model), before, "the copy shares nothing");
        }
    }
}

/// Dtypes of files, and of models that hold every value of them.
const EXACT: [(FileDtype, Dtype); 4] = [
    (FileDtype::Bf16, Dtype::Bf16),
    (FileDtype::Bf16, Dtype::F32),
    (FileDtype::F32, Dtype::F32),
    (FileDtype::F16, Dtype::F32),
];

/// A copy takes changes without a way back, and the weights that it was made of stay.
fn copies_take_changes_on(device: Device) {
    for golden in golden_models() {
        for (file, held) in EXACT {
            let step = Step::new(&golden, file);
            let (model, target) = (load_on(device, &step.base, held), load_on(device, &step.target, held));
            let (before, wanted) = (bits(&model), step.checksums());
            let mut copy = model.copy().unwrap();
            assert_eq!(bits(&copy), before);
            // As it is done on every device but a CPU, in many parts and groups.
            copy.write_in_groups(&Changes::open(&step.changes, &model).unwrap(), 100, 1_000).unwrap();
            copy.confirm(target.weights_hash(), &wanted).unwrap();
            assert_eq!((bits(&copy), copy.weights_hash()), (bits(&target), target.weights_hash()));
            assert_eq!(bits(&model), before, "the copy shares nothing");
        }
    }
}

#[test]
fn copies_take_changes() {
    copies_take_changes_on(Device::Cpu);
}

#[test]
fn staged_changes_are_checked_before_they_touch_anything_and_lead_there_and_back() {
    staged_changes_lead_there_and_back_on(Device::Cpu);
}

/// The same where kernels of our own do it.
#[test]
#[ignore = "needs a GPU"]
fn gpu_tests_of_changes() {
    // Before libtorch looks for a device: it remembers that there was none.
    assert!(matches!(crate::gpu::enable(), crate::gpu::GpuSupport::Loaded { .. }), "no CUDA library");
    copies_take_changes_on(Device::Cuda(0));
    staged_changes_lead_there_and_back_on(Device::Cuda(0));
}

fn staged_changes_lead_there_and_back_on(device: Device) {
    for golden in golden_models() {
        for (file, held) in EXACT {
            let step = Step::new(&golden, file);
            let (mut model, target) = (load_on(device, &step.base, held), load_on(device, &step.target, held));
            let (bits_before, hash) = (bits(&model), model.weights_hash());
            let (before, wanted) = (model.checksums().unwrap(), step.checksums());
            let changes = Changes::open(&step.changes, &model).unwrap();
            let room = changes.staged_bytes(&model).unwrap();
            assert!(room >= changes.elements() * 2 * model.dtype().kind().elt_size_in_bytes() as u64);

            let mut other = wanted.clone();
            *other.values_mut().next().unwrap() ^= 1;
            for (before, wanted) in [(&before, &other), (&wanted, &wanted)] {
                let refused = model.stage(&changes, before, wanted).unwrap_err();
                assert!(matches!(refused, ChangeError::Checksum(ChecksumError::Differs { .. })), "{refused}");
            }
            let staged = model.stage(&changes, &before, &wanted).unwrap();
            assert_eq!((bits(&model), model.weights_hash()), (bits_before.clone(), hash), "nothing was touched");

            model.take(&staged, target.weights_hash()).unwrap();
            assert_eq!((bits(&model), model.weights_hash()), (bits(&target), target.weights_hash()));
            model.compare(&wanted).unwrap();
            let again = model.take(&staged, hash).unwrap_err();
            assert!(matches!(again, ChangeError::OtherWeights { .. }), "{again}");
            model.give_back(&staged).unwrap();
            assert_eq!((bits(&model), model.weights_hash()), (bits_before, hash));
        }
    }
}

#[test]
fn folders_and_second_names_of_the_embedding_are_not_staged() {
    let golden = grail_golden::path("models/qwen2-tied");
    let model = load(&golden, Dtype::Bf16);
    assert_eq!(Changes::from_folder(&golden, &model).unwrap().staged_bytes(&model), None);
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("changes");
    write(&path, &[index(&[0]), entry("value/model.norm.weight", FileDtype::Bf16, &[1], &[0; 2])]).unwrap();
    // A position of four bytes, old and new bits of two.
    assert_eq!(Changes::open(&path, &model).unwrap().staged_bytes(&model), Some(8));
    let head = |part: &str| format!("{part}/{}", crate::weights::HEAD);
    let mut model = model;
    model.dtypes.insert(crate::weights::HEAD.to_owned(), FileDtype::Bf16);
    let of_head =
        [entry(&head("index"), INDEX_DTYPE, &[1], &[0; 4]), entry(&head("value"), FileDtype::Bf16, &[1], &[0; 2])];
    write(&path, &of_head).unwrap();
    assert_eq!(Changes::open(&path, &model).unwrap().staged_bytes(&model), None);
}

#[test]
fn a_tied_output_matrix_in_the_files_changes_with_its_embedding() {
    let golden = grail_golden::path("models/qwen2-tied");
    let folder = tempfile::tempdir().unwrap();
    let paths = ["base", "target"].map(|name| folder.path().join(name));
    for (place, path) in paths.iter().enumerate() {
        std::fs::create_dir(path).unwrap();
        std::fs::copy(golden.join("config.json"), path.join("config.json")).unwrap();
        let mut tensors = Vec::new();
        for (name, view) in WeightFiles::open(&golden).unwrap().iter() {
            let mut bytes = view.bytes.to_vec();
            if name == crate::weights::EMBEDDING {
                if place == 1 {
                    change(2, &mut bytes, view.dtype);
                }
                let (name, shape) = (crate::weights::HEAD.to_owned(), view.shape.to_vec());
                tensors.push(OwnedTensor { name, dtype: view.dtype, shape, bytes: bytes.clone() });
            }
            tensors.push(OwnedTensor { name: name.to_owned(), dtype: view.dtype, shape: view.shape.to_vec(), bytes });
        }
        write(&path.join("model.safetensors"), &tensors).unwrap();
    }
    let files = paths.each_ref().map(|path| WeightFiles::open(path).unwrap());
    let path = folder.path().join("changes");
    write_difference(&files[0], &files[1], &path).unwrap();
    let mut model = load(&paths[0], Dtype::F32);
    let (before, changes) = (bits(&model), Changes::open(&path, &model).unwrap());
    let mut undo = Undo::default();
    model.apply(&changes, Some(&mut undo)).unwrap();
    let mut wanted = files[1].checksums();
    model.compare(&wanted).unwrap();
    let mut copy = load(&paths[0], Dtype::F32).copy().unwrap();
    copy.write_unstaged(&changes).expect("the same elements under both names");
    copy.compare(&wanted).unwrap();
    wanted.remove(crate::weights::HEAD);
    model.compare(&wanted).expect("it may be named or not");
    model.revert(&changes, undo).unwrap();
    assert_eq!(bits(&model), before);
}

/// A tensor of a file of changes.
fn entry(name: &str, dtype: FileDtype, shape: &[usize], bytes: &[u8]) -> OwnedTensor {
    OwnedTensor { name: name.to_owned(), dtype, shape: shape.to_vec(), bytes: bytes.to_vec() }
}

fn index(positions: &[u32]) -> OwnedTensor {
    let bytes: Vec<u8> = positions.iter().flat_map(|position| position.to_le_bytes()).collect();
    entry("index/model.norm.weight", INDEX_DTYPE, &[positions.len()], &bytes)
}

#[test]
fn wrong_changes_are_refused_by_name_before_anything_is_touched() {
    let model = load(&grail_golden::path("models/qwen2-tied"), Dtype::F32);
    let hidden = model.config().hidden_size;
    let norm = "model.norm.weight";
    let values = |count: usize| entry(&format!("value/{norm}"), FileDtype::Bf16, &[count], &vec![0; count * 2]);
    let one_past = u32::try_from(hidden).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("changes");
    let u64s = FileDtype::Other { name: "U64", element_bytes: 8 };
    for (tensors, expected) in [
        (vec![entry("norm", FileDtype::Bf16, &[1], &[0; 2])], "none of index/NAME, value/NAME and whole/NAME"),
        (vec![values(1)], "it has values and no index"),
        (vec![index(&[0])], "it has no value"),
        (vec![index(&[0, 1]), values(1)], "2 positions have values of shape [1]"),
        (vec![index(&[1, 1]), values(2)], "its positions do not ascend"),
        (vec![index(&[2, 1]), values(2)], "its positions do not ascend"),
        (vec![index(&[0, one_past]), values(2)], "is outside its"),
        (vec![entry(&format!("index/{norm}"), u64s, &[1], &[0; 8]), values(1)], "its index is U64, not U32"),
        (vec![entry(&format!("index/{norm}"), INDEX_DTYPE, &[1, 1], &[0; 4]), values(1)], "not one dimension"),
        (
            vec![index(&[0]), entry(&format!("value/{norm}"), FileDtype::F32, &[1], &[0; 4])],
            "its values are F32, the model's file has BF16",
        ),
        (vec![entry("whole/model.nose.weight", FileDtype::Bf16, &[1], &[0; 2])], "the model has no such tensor"),
        (vec![entry(&format!("whole/{norm}"), FileDtype::Bf16, &[1], &[0; 2])], "its shape is [1], the model's"),
        (
            vec![
                index(&[0]),
                values(1),
                entry(&format!("whole/{norm}"), FileDtype::Bf16, &[hidden], &vec![0; hidden * 2]),
            ],
            "it is there whole and by index",
        ),
    ] {
        write(&path, &tensors).unwrap();
        let error = Changes::open(&path, &model).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
    }
    write(&path, &[index(&[0, one_past - 1]), values(2)]).unwrap();
    assert_eq!(Changes::open(&path, &model).unwrap().elements(), 2);
    let bytes = std::fs::read(&path).unwrap();
    std::fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
    assert!(matches!(Changes::open(&path, &model), Err(ChangeError::Safetensors(_))));
}

#[test]
fn what_is_held_in_fewer_bits_than_its_file_is_never_changed_or_compared() {
    let step = Step::new(&grail_golden::path("models/qwen2-tied"), FileDtype::F32);
    let model = load(&step.base, Dtype::Bf16);
    assert!(matches!(model.checksums(), Err(ChecksumError::Inexact { file: "F32", .. })));
    let refused = Changes::open(&step.changes, &model).unwrap_err();
    assert!(refused.to_string().contains("F32 is held as bfloat16, which loses bits"), "{refused}");
}

#[test]
fn a_list_of_checksums_must_name_every_tensor_and_no_other() {
    let model = load(&grail_golden::path("models/qwen3-untied"), Dtype::Bf16);
    let wanted = model.checksums().unwrap();
    let changed = |change: &dyn Fn(&mut Checksums)| {
        let mut wanted = wanted.clone();
        change(&mut wanted);
        model.compare(&wanted).unwrap_err()
    };
    let less = changed(&|wanted| assert!(wanted.remove("lm_head.weight").is_some()));
    assert!(matches!(less, ChecksumError::Missing { tensor } if tensor == "lm_head.weight"));
    let more = changed(&|wanted| assert!(wanted.insert("lm_nose.weight".to_owned(), 0).is_none()));
    assert!(matches!(more, ChecksumError::Unknown { tensor } if tensor == "lm_nose.weight"));
    let other = changed(&|wanted| *wanted.get_mut("model.norm.weight").unwrap() += 1);
    assert!(matches!(other, ChecksumError::Differs { tensor, .. } if tensor == "model.norm.weight"));
}

#[test]
fn the_folder_of_another_model_is_no_change() {
    let model = load(&grail_golden::path("models/qwen2-tied"), Dtype::F32);
    let refused = Changes::from_folder(&grail_golden::path("models/qwen3-tied"), &model).unwrap_err();
    assert!(refused.to_string().contains("describes another model"), "{refused}");
}
