//! Mirrors of invented checkpoints: chains, shards, what lies beside the weights, and what goes wrong.

use std::collections::BTreeMap;
use std::path::Path;

use crate::faulty::{FaultyStore, checkpoints, metadata_input};
use crate::folders::{Change, Tensor, Tensors, assert_changes, read_changes, read_tensors, write_file, write_folder};
use grail_checkpoint::delta::{DELTA_METADATA_FILE, DeltaEncoder, EncodeError, PAYLOAD_FILE};
use grail_checkpoint::layout::{Tree, object_key, ready_key};
use grail_checkpoint::manifest::hash_file;
use grail_checkpoint::metadata::PublishedHash;
use grail_checkpoint::mirror::{build, carry_files};
use grail_checkpoint::{
    ChangeSet, Delta, DeltaError, DeltaFormat, DeltaInput, DeltaMetadata, Manifest, Metadata, Mirror, MirrorError,
    MirrorPlan, PublishError, Shapes, Verdict, WeightsFiles, publish_delta,
};
use grail_protocol::ids::{CheckpointWindow, WeightsHash};
use proptest::prelude::*;

const BASE_WINDOW: CheckpointWindow = CheckpointWindow(270);

fn bf16(shape: &[u64], bits: impl Fn(u64) -> u16) -> Tensor {
    let elements: u64 = shape.iter().product();
    let bytes = (0..elements).flat_map(|element| bits(element).to_le_bytes()).collect();
    Tensor { dtype: "BF16".to_owned(), shape: shape.to_vec(), bytes }
}

fn named(tensors: impl IntoIterator<Item = (&'static str, Tensor)>) -> Tensors {
    tensors.into_iter().map(|(name, tensor)| (name.to_owned(), tensor)).collect()
}

fn set(tensors: &mut Tensors, name: &str, element: usize, bits: u16) {
    tensors.get_mut(name).unwrap().bytes[2 * element..2 * element + 2].copy_from_slice(&bits.to_le_bytes());
}

fn shapes(tensors: &Tensors) -> Shapes {
    let shape = |tensor: &Tensor| grail_checkpoint::delta::TensorShape {
        dtype: tensor.dtype.clone(),
        shape: tensor.shape.clone(),
    };
    tensors.iter().map(|(name, tensor)| (name.clone(), shape(tensor))).collect()
}

fn encode(format: DeltaFormat, old: &Tensors, new: &Tensors) -> Vec<u8> {
    let shapes = shapes(old);
    let mut encoder = DeltaEncoder::new(format);
    for (name, tensor) in old {
        encoder.tensor(name, shapes.get(name).unwrap(), &tensor.bytes, &new[name].bytes).unwrap();
    }
    encoder.finish().unwrap().payload
}

fn decode(format: DeltaFormat, base: &Tensors, payload: &[u8]) -> Result<Delta, DeltaError> {
    Delta::decode(payload, format, &shapes(base), &std::env::temp_dir())
}

fn step(format: DeltaFormat, old: &Tensors, new: &Tensors) -> Delta {
    decode(format, old, &encode(format, old, new)).unwrap()
}

fn mirror(base: &Path, deltas: &[Delta], target: &Path) -> Result<Mirror, MirrorError> {
    let base = WeightsFiles::open(base)?;
    let base_hash = base.hash()?;
    build(&MirrorPlan { base: &base, base_window: BASE_WINDOW, base_hash, deltas, target })
}

/// Builds a mirror and holds everything it says against `new`.
fn assert_mirror(base: &Path, deltas: &[Delta], new: &Tensors) -> tempfile::TempDir {
    let target = tempfile::tempdir().unwrap();
    let made = mirror(base, deltas, target.path()).unwrap();
    let weights = WeightsFiles::open(target.path()).unwrap();
    assert_eq!(&read_tensors(&weights), new);
    let fingerprint = weights.fingerprint().unwrap();
    assert_eq!((made.weights_hash, &made.checksums), (fingerprint.weights_hash, &fingerprint.checksums));
    assert_eq!(made.weights_hash, weights.hash().unwrap());
    for (name, digest) in &made.files {
        assert_eq!(hash_file(&target.path().join(name)).unwrap().1, *digest, "{name}");
    }
    let base = WeightsFiles::open(base).unwrap();
    assert_eq!(made.changes.base, base.hash().unwrap());
    assert_changes(&made.changes, &read_tensors(&base), new);
    let recorded = ChangeSet::from_json(&made.changes.to_json(), target.path());
    assert_eq!(recorded.as_ref(), Some(&made.changes));
    target
}

fn two_tensors() -> Tensors {
    named([
        ("Z.weight", bf16(&[3, 5], |element| u16::try_from(element).unwrap())),
        ("a.weight", bf16(&[7], |_| 0x3F80)),
    ])
}

#[test]
fn the_last_value_of_a_chain_wins_and_what_came_back_is_no_change() {
    let base = two_tensors();
    let folder = write_folder(&base);
    let mut first = base.clone();
    set(&mut first, "a.weight", 0, 0x4000);
    set(&mut first, "Z.weight", 14, 0x4000);
    set(&mut first, "Z.weight", 2, 0x4000);
    let mut second = first.clone();
    set(&mut second, "a.weight", 0, 0x3F80);
    set(&mut second, "Z.weight", 14, 0x4100);
    set(&mut second, "Z.weight", 0, 0x4200);
    let deltas = [step(DeltaFormat::V2, &base, &first), step(DeltaFormat::V31, &first, &second)];
    let target = assert_mirror(folder.path(), &deltas, &second);
    let again = tempfile::tempdir().unwrap();
    let changes = read_changes(&mirror(folder.path(), &deltas, again.path()).unwrap().changes);
    let elements =
        [(0, 0x4200_u16), (2, 0x4000), (14, 0x4100)].map(|(place, bits)| (place, bits.to_le_bytes().to_vec()));
    assert_eq!(changes, BTreeMap::from([("Z.weight".to_owned(), Change::Elements(elements.to_vec()))]));
    let files =
        ["changes/from-270.bin", "model.safetensors"].map(|name| std::fs::read(target.path().join(name)).unwrap());
    let same =
        ["changes/from-270.bin", "model.safetensors"].map(|name| std::fs::read(again.path().join(name)).unwrap());
    assert_eq!(files, same);
}

#[test]
fn without_a_change_the_mirror_is_its_base() {
    let base = two_tensors();
    let folder = write_folder(&base);
    let empty = decode(DeltaFormat::V31, &base, b"").unwrap();
    assert_eq!(empty.listed(), 0);
    assert_mirror(folder.path(), &[empty, step(DeltaFormat::V3, &base, &base)], &base);
    assert_mirror(folder.path(), &[], &base);
}

#[test]
fn changes_on_the_edges_of_blocks_are_not_lost() {
    // A block has 2^21 elements of 16 bits; the walk of a cursor is cut into pieces of 8192.
    let base = named([("w", bf16(&[5, 1 << 20], |element| u16::try_from(element % 30_000).unwrap() + 1))]);
    let folder = write_folder(&base);
    let mut new = base.clone();
    for element in [0, 1, (1 << 21) - 1, 1 << 21, (1 << 22) - 1, 1 << 22, (5 << 20) - 1] {
        set(&mut new, "w", element, 0x7F00);
    }
    for element in (3 << 19..4 << 19).step_by(3) {
        set(&mut new, "w", element, 0x7F01);
    }
    for format in DeltaFormat::ALL {
        assert_mirror(folder.path(), &[step(format, &base, &new)], &new);
    }
}

#[test]
fn a_sharded_base_becomes_one_file_and_what_lies_beside_is_carried() {
    let base = two_tensors();
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    for (shard, name) in
        [("model-00001-of-00002.safetensors", "a.weight"), ("model-00002-of-00002.safetensors", "Z.weight")]
    {
        write_file(&path(shard), base.get_key_value(name));
    }
    let index = serde_json::json!({"weight_map": {
        "a.weight": "model-00001-of-00002.safetensors", "Z.weight": "model-00002-of-00002.safetensors"}});
    std::fs::write(path("model.safetensors.index.json"), index.to_string()).unwrap();
    std::fs::create_dir_all(path("changes")).unwrap();
    std::fs::create_dir_all(path("nested")).unwrap();
    for (name, text) in [
        ("config.json", "{}"),
        ("nested/changes.txt", "x"),
        ("changes/from-240.bin", "old"),
        ("metadata.json", "{}"),
        ("unlisted.txt", "nothing vouches for it"),
    ] {
        std::fs::write(path(name), text).unwrap();
    }
    let listed = [
        "config.json",
        "nested/changes.txt",
        "changes/from-240.bin",
        "metadata.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ];
    let manifest: Manifest =
        listed.iter().map(|name| ((*name).to_owned(), hash_file(&path(name)).unwrap().1)).collect();

    let mut new = base.clone();
    set(&mut new, "Z.weight", 3, 0x4000);
    let target = assert_mirror(folder.path(), &[step(DeltaFormat::V31, &base, &new)], &new);
    let carried = carry_files(folder.path(), &manifest, target.path()).unwrap();
    let names: Vec<&str> = carried.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["config.json", "nested/changes.txt"]);
    for (name, digest) in &carried {
        assert_eq!(hash_file(&target.path().join(name)).unwrap().1, *digest);
    }
    let mut found: Vec<_> = std::fs::read_dir(target.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    found.sort();
    assert_eq!(found, ["changes", "config.json", "model.safetensors", "nested"]);
}

#[test]
fn a_delta_for_another_base_and_a_target_in_use_are_refused() {
    let base = two_tensors();
    let other = named([("a.weight", bf16(&[8], |_| 1))]);
    let mut changed = other.clone();
    set(&mut changed, "a.weight", 7, 5);
    let folder = write_folder(&base);
    let target = tempfile::tempdir().unwrap();
    let error = mirror(folder.path(), &[step(DeltaFormat::V2, &other, &changed)], target.path()).unwrap_err();
    assert!(matches!(&error, MirrorError::OtherBase { tensor } if tensor == "a.weight"), "{error}");
    assert_eq!(std::fs::read_dir(target.path()).unwrap().count(), 0);

    let error = mirror(folder.path(), &[], folder.path()).unwrap_err();
    assert!(matches!(&error, MirrorError::Io { path, .. } if path.ends_with("model.safetensors")), "{error}");
    assert_eq!(read_tensors(&WeightsFiles::open(folder.path()).unwrap()), base);
}

#[test]
fn a_base_that_ends_early_stops_the_mirror() {
    let base = named([("w", bf16(&[3 << 21], |_| 7))]);
    let folder = write_folder(&base);
    let weights = WeightsFiles::open(folder.path()).unwrap();
    let file = std::fs::File::options().write(true).open(folder.path().join("model.safetensors")).unwrap();
    file.set_len(5 << 20).unwrap();
    let target = tempfile::tempdir().unwrap();
    let (base_hash, target) = (WeightsHash(0), target.path());
    let plan = MirrorPlan { base: &weights, base_window: BASE_WINDOW, base_hash, deltas: &[], target };
    let error = build(&plan).unwrap_err();
    assert!(matches!(error, MirrorError::Weights(_)), "{error}");
    assert!(!error.is_disk_full());
}

fn tensors_and_steps() -> impl Strategy<Value = (Tensors, Vec<(DeltaFormat, Tensors)>)> {
    let shape = prop_oneof![
        proptest::collection::vec(1_u64..40, 1..=1),
        proptest::collection::vec(1_u64..12, 2..=4),
        Just(vec![2, 70_000]),
        Just(vec![300, 3]),
        Just(vec![0, 4]),
    ];
    let dtype = prop_oneof![Just("BF16"), Just("F16"), Just("F32")];
    let tensor = (dtype, shape, any::<u64>()).prop_map(|(dtype, shape, seed)| {
        let elements: u64 = shape.iter().product();
        let width = if dtype == "F32" { 4 } else { 2 };
        let bits = |element: u64| seed.wrapping_mul(element.wrapping_mul(2) + 1) >> 32;
        let bytes = (0..elements).flat_map(|element| bits(element).to_le_bytes().into_iter().take(width));
        Tensor { dtype: dtype.to_owned(), shape, bytes: bytes.collect() }
    });
    let edits = (any::<u64>(), 1_u64..200);
    let steps = proptest::collection::vec((proptest::sample::select(&DeltaFormat::ALL[..]), edits), 0..4);
    (proptest::collection::btree_map("[a-zA-Zé.\"\\\\]{1,8}", tensor, 1..5), steps).prop_map(|(base, steps)| {
        let mut last: Tensors = base.clone();
        let steps = steps.into_iter().map(|(format, (seed, one_in))| {
            last.values_mut().for_each(|tensor| edit(tensor, seed, one_in));
            (format, last.clone())
        });
        let steps = steps.collect();
        (base, steps)
    })
}

/// Gives about one of `one_in` elements other bits; never those of a zero, whose sign a delta loses.
fn edit(tensor: &mut Tensor, seed: u64, one_in: u64) {
    let width = tensor.width();
    for (element, bytes) in (1..).zip(tensor.bytes.chunks_mut(width)) {
        let random = seed.wrapping_mul(2 * element + 1).wrapping_add(element << 17);
        if (random >> 40).is_multiple_of(one_in) {
            bytes.copy_from_slice(&(random | 1).to_le_bytes()[..width]);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn any_chain_in_any_format_is_mirrored((base, steps) in tensors_and_steps()) {
        let folder = write_folder(&base);
        let mut last = &base;
        let mut deltas = Vec::new();
        for (format, next) in &steps {
            deltas.push(step(*format, last, next));
            last = next;
        }
        assert_mirror(folder.path(), &deltas, last);
    }
}

fn delta_input<'a>(base_folder: &'a Path, folder: &'a Path, format: DeltaFormat) -> DeltaInput<'a> {
    DeltaInput {
        window: CheckpointWindow(300),
        folder,
        base_window: BASE_WINDOW,
        base_folder,
        anchor: Some(CheckpointWindow(240)),
        format,
        ready: Some(330),
    }
}

#[tokio::test]
async fn a_published_delta_leads_to_the_published_weights() {
    let base = two_tensors();
    let mut new = base.clone();
    set(&mut new, "a.weight", 6, 0x4000);
    let (base_folder, folder) = (write_folder(&base), write_folder(&new));
    for format in DeltaFormat::ALL {
        let store = FaultyStore::new();
        let target = checkpoints(&store);
        let input = delta_input(base_folder.path(), folder.path(), format);
        let published = publish_delta(&target, &input, &metadata_input()).await.unwrap();
        assert_eq!((published.listed, published.elements), (1, 22));
        let listing = target.list().await.unwrap();
        let key = |name: &str| object_key(input.window, Tree::Delta, name);
        let mut expected = vec![
            key("DELTA"),
            key(DELTA_METADATA_FILE),
            key(PAYLOAD_FILE),
            key("metadata.json"),
            ready_key(input.window, 330),
        ];
        expected.sort();
        let mut found: Vec<&str> = listing.keys().collect();
        found.sort_unstable();
        assert_eq!(found, expected);

        let metadata = Metadata::parse(&store.body(&key("metadata.json")).await, input.window, Tree::Delta).unwrap();
        assert_eq!(metadata.verdict(), Verdict::Mine);
        assert_eq!(metadata.base().unwrap(), BASE_WINDOW);
        assert_eq!(metadata.document()["anchor_window"], 240);
        assert_eq!(metadata.weights_hash, PublishedHash::Stated(published.weights_hash));
        for (name, digest) in metadata.files().unwrap().required() {
            let bytes = store.body(&key(name)).await;
            assert_eq!(digest.0, <[u8; 32]>::from(<sha2::Sha256 as sha2::Digest>::digest(&bytes)), "{name}");
        }
        let about = store.body(&key(DELTA_METADATA_FILE)).await;
        assert_eq!(DeltaMetadata::parse(&about).unwrap().format, format);
        let about: serde_json::Value = serde_json::from_slice(&about).unwrap();
        assert_eq!((&about["total_params"], &about["nonzero_params"]), (&22.into(), &1.into()));
        assert_eq!(about["shapes"], serde_json::json!({"a.weight": [7]}));
        let payload = store.body(&key(PAYLOAD_FILE)).await;
        assert_eq!(payload.len() as u64, published.bytes);
        let made = assert_mirror(base_folder.path(), &[decode(format, &base, &payload).unwrap()], &new);
        assert_eq!(WeightsFiles::open(made.path()).unwrap().hash().unwrap(), published.weights_hash);
    }
}

#[tokio::test]
async fn a_delta_without_a_marker_is_no_checkpoint_of_any_window() {
    let base = two_tensors();
    let folder = write_folder(&base);
    let store = FaultyStore::new();
    let input = DeltaInput { ready: None, anchor: None, ..delta_input(folder.path(), folder.path(), DeltaFormat::V3) };
    publish_delta(&checkpoints(&store), &input, &metadata_input()).await.unwrap();
    let listing = checkpoints(&store).list().await.unwrap();
    assert_eq!(listing.len(), 4);
    assert!(grail_checkpoint::ready::markers(listing.keys()).next().is_none());
}

#[tokio::test]
async fn checkpoints_without_a_delta_between_them_are_not_published() {
    let base = two_tensors();
    let base_folder = write_folder(&base);
    let mut reshaped = base.clone();
    reshaped.get_mut("Z.weight").unwrap().shape = vec![5, 3];
    let mut fewer = base.clone();
    fewer.remove("a.weight");
    let mut more = base.clone();
    more.insert("b".to_owned(), bf16(&[1], |_| 0));
    for other in [reshaped, fewer, more] {
        let folder = write_folder(&other);
        let store = FaultyStore::new();
        let input = delta_input(base_folder.path(), folder.path(), DeltaFormat::V31);
        let error = publish_delta(&checkpoints(&store), &input, &metadata_input()).await.unwrap_err();
        assert!(matches!(error, PublishError::OtherTensors { .. }), "{error}");
        assert_eq!(checkpoints(&store).list().await.unwrap().len(), 0);
    }
    let scalar = named([("s", Tensor { shape: vec![], ..bf16(&[1], |_| 1) })]);
    let other = named([("s", Tensor { shape: vec![], ..bf16(&[1], |_| 2) })]);
    let (base_folder, folder) = (write_folder(&scalar), write_folder(&other));
    let input = delta_input(base_folder.path(), folder.path(), DeltaFormat::V31);
    let error = publish_delta(&checkpoints(&FaultyStore::new()), &input, &metadata_input()).await.unwrap_err();
    assert!(matches!(error, PublishError::Encode(EncodeError::Scalar { .. })), "{error}");
}
