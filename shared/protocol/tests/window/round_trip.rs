//! What is written is read back, and has the reference's schema.

use std::collections::HashMap;

use bytes::Bytes;
use grail_protocol::ids::{CheckpointWindow, GroupIndex, RolloutIndex, TokenId};
use grail_protocol::randomness::MinerRandomness;
use grail_protocol::window_file::{
    METADATA_KEYS, ReadRow, Row, WindowFile, WriteError, Writer, read_bytes, write_file,
};
use parquet::arrow::parquet_to_arrow_schema;
use parquet::basic::Compression;
use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::schema::printer::print_schema;
use proptest::prelude::*;

use crate::samples::{golden_bytes, header, row, rows};

fn written(rows: &[Row]) -> Vec<u8> {
    write_file(Vec::new(), header(), rows).unwrap()
}

fn as_read(rows: &[Row]) -> Vec<ReadRow> {
    rows.iter().map(|row| ReadRow::try_from(row).unwrap()).collect()
}

fn assert_same(file: &WindowFile, rows: &[Row]) {
    assert_eq!(file.metadata.wallet, header().wallet.0);
    assert_eq!(file.metadata.window_start, 3_600_000);
    assert_eq!(file.metadata.window_length, 30);
    assert_eq!(file.metadata.inference_count, rows.len() as i128);
    assert_eq!(file.metadata.timestamp, 1_732_301_234.25);
    assert!(file.rows == as_read(rows), "the rows are not the written ones");
}

#[test]
fn an_empty_file_is_a_file() {
    assert_same(&read_bytes(written(&[])).unwrap(), &[]);
}

#[test]
fn rows_of_many_row_groups_keep_their_order() {
    // Four row groups: one slice is encoded in parallel, the rest joins the open one bit by bit.
    let rows: Vec<Row> = (0..40).map(|index| row(index, 3, 9_000, 41_000)).collect();
    let mut writer = Writer::new(Vec::new(), header()).unwrap();
    writer.append(&rows[..3]).unwrap();
    assert!(writer.estimated_bytes() > 0);
    writer.append(&rows[3..37]).unwrap();
    writer.append(&rows[37..]).unwrap();
    assert_eq!(writer.rows(), 40);
    let bytes = Bytes::from(writer.finish().unwrap());
    let metadata = SerializedFileReader::new(bytes.clone()).unwrap();
    assert!(metadata.metadata().num_row_groups() >= 3);
    assert_same(&read_bytes(bytes).unwrap(), &rows);
}

#[test]
fn schema_and_settings_are_those_of_the_reference() {
    let ours = SerializedFileReader::new(Bytes::from(written(&rows(0..2, 5, 40)))).unwrap();
    let theirs = SerializedFileReader::new(Bytes::from(golden_bytes("valid"))).unwrap();
    let printed = |reader: &SerializedFileReader<Bytes>| {
        let mut text = Vec::new();
        print_schema(&mut text, reader.metadata().file_metadata().schema());
        // The name of the root carries no meaning; ours and theirs differ in it.
        String::from_utf8(text).unwrap().lines().skip(1).map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(printed(&ours), printed(&theirs));

    let arrow = |reader: &SerializedFileReader<Bytes>| {
        let file = reader.metadata().file_metadata();
        parquet_to_arrow_schema(file.schema_descr(), file.key_value_metadata()).unwrap()
    };
    assert_eq!(arrow(&ours).fields(), arrow(&theirs).fields());
    let texts = |reader: &SerializedFileReader<Bytes>| -> HashMap<String, String> {
        let entries = reader.metadata().file_metadata().key_value_metadata().unwrap();
        entries.iter().map(|entry| (entry.key.clone(), entry.value.clone().unwrap())).collect()
    };
    let entries = texts(&ours);
    let mut keys: Vec<&str> = entries.keys().map(String::as_str).collect();
    keys.sort_unstable();
    let mut expected = METADATA_KEYS.to_vec();
    expected.push("ARROW:schema");
    expected.sort_unstable();
    assert_eq!(keys, expected);
    assert_eq!(entries["timestamp"], "1732301234.25");
    // The embedded schema alone has them too.
    let embedded = parquet::file::metadata::KeyValue::new("ARROW:schema".to_owned(), entries["ARROW:schema"].clone());
    let schema =
        parquet_to_arrow_schema(ours.metadata().file_metadata().schema_descr(), Some(&vec![embedded])).unwrap();
    for key in METADATA_KEYS {
        assert_eq!(schema.metadata().get(key), entries.get(key), "{key}");
    }

    for column in ours.metadata().row_group(0).columns() {
        assert!(matches!(column.compression(), Compression::ZSTD(_)), "{}", column.column_path());
        assert!(column.statistics().is_some(), "{}", column.column_path());
    }
}

#[test]
fn what_no_column_holds_is_refused() {
    let refuse = |change: fn(&mut Row)| {
        let mut row = row(0, 0, 4, 40);
        change(&mut row);
        let mut writer = Writer::new(Vec::new(), header()).unwrap();
        let error = writer.append(&[row]).unwrap_err();
        assert!(matches!(error, WriteError::Row { .. }), "{error}");
        error.to_string()
    };
    insta_like(&refuse(|row| row.commit.tokens[3] = TokenId(1 << 31)), "token 2147483648 does not fit");
    insta_like(&refuse(|row| row.commit.sketches.truncate(7)), "7 sketches for 44 tokens");
    insta_like(&refuse(|row| row.commit.rollout.prompt_length = 5), "5 prompt tokens and 40 logprobs for 44 tokens");
    insta_like(&refuse(|row| row.checkpoint = CheckpointWindow(u64::MAX)), "block 18446744073709551615");
}

fn insta_like(text: &str, part: &str) {
    assert!(text.contains(part), "{text}");
}

fn any_row() -> impl Strategy<Value = Row> {
    let logprob = prop_oneof![(-40.0_f32..=0.0), Just(f32::NEG_INFINITY), Just(-0.0_f32), Just(f32::MIN_POSITIVE),];
    let lists = (0_u32..24, proptest::collection::vec(logprob, 0..48));
    (lists, any::<i64>(), 0_u8..16, any::<(f64, f64, bool, bool)>(), "\\PC{0,20}", any::<[u8; 32]>()).prop_flat_map(
        |((prompt, logprobs), group, rollout, (reward, advantage, success, drand), name, randomness)| {
            let length = prompt as usize + logprobs.len();
            let tokens = proptest::collection::vec(0_u32..1 << 31, length);
            let sketches = proptest::collection::vec(any::<u32>(), length);
            (tokens, sketches).prop_map(move |(tokens, sketches)| {
                let mut row = row(0, rollout, 0, 0);
                // 16 · group + rollout must stay within 64 bits.
                row.group = GroupIndex(group / 32);
                row.rollout = RolloutIndex::new(rollout).unwrap();
                row.use_drand = drand;
                row.signature.clone_from(&name);
                row.commit.tokens = tokens.into_iter().map(TokenId).collect();
                row.commit.sketches = sketches;
                row.commit.model_name.clone_from(&name);
                row.commit.randomness = MinerRandomness::from_bytes(&randomness);
                row.commit.rollout.prompt_length = prompt;
                row.commit.rollout.completion_logprobs.clone_from(&logprobs);
                row.commit.rollout.total_reward = reward;
                row.commit.rollout.advantage = advantage;
                row.commit.rollout.success = success;
                row
            })
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn any_rows_in_any_slices_are_read_back(
        rows in proptest::collection::vec(any_row(), 0..40),
        cuts in proptest::collection::vec(0_usize..40, 0..6),
    ) {
        let mut writer = Writer::new(Vec::new(), header()).unwrap();
        let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(rows.len())).chain([0, rows.len()]).collect();
        cuts.sort_unstable();
        for pair in cuts.windows(2) {
            writer.append(&rows[pair[0]..pair[1]]).unwrap();
        }
        let file = read_bytes(writer.finish().unwrap()).unwrap();
        prop_assert_eq!(file.metadata.inference_count, rows.len() as i128);
        prop_assert_eq!(format!("{:?}", file.rows), format!("{:?}", as_read(&rows)));
    }
}
