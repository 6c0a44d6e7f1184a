//! The same rows in other layouts, and files with holes.

use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::types::{Float32Type, Int32Type, Int64Type};
use arrow_array::{
    Array, ArrayRef, Float64Array, Int16Array, Int32Array, Int64Array, LargeListArray, LargeStringArray, ListArray,
    RecordBatch, StringArray, StructArray, UInt64Array,
};
use arrow_buffer::NullBuffer;
use arrow_schema::{DataType, Field, Fields, Schema};
use bytes::Bytes;
use grail_protocol::json::Value;
use grail_protocol::window_file::{Commitments, List, ReadError, ReadRow, WindowFile, read_bytes};
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use parquet::basic::{BrotliLevel, Compression, GzipLevel, ZstdLevel};
use parquet::file::properties::{WriterProperties, WriterVersion};

use crate::samples::{golden, golden_bytes};

/// The reference's `valid.parquet` as one batch.
fn batch() -> RecordBatch {
    let builder = ParquetRecordBatchReaderBuilder::try_new(Bytes::from(golden_bytes("valid"))).unwrap();
    let schema = Arc::clone(builder.schema());
    let mut batches: Vec<RecordBatch> = builder.with_batch_size(4_096).build().unwrap().map(Result::unwrap).collect();
    assert_eq!(batches.len(), 1);
    // A batch has no metadata of its own.
    RecordBatch::try_new(schema, batches.remove(0).columns().to_vec()).unwrap()
}

fn write(batch: &RecordBatch, properties: WriterProperties) -> Vec<u8> {
    let mut file = Vec::new();
    let mut writer = ArrowWriter::try_new(&mut file, batch.schema(), Some(properties)).unwrap();
    writer.write(batch).unwrap();
    writer.close().unwrap();
    file
}

fn written(batch: &RecordBatch) -> Vec<u8> {
    write(batch, WriterProperties::default())
}

fn read(batch: &RecordBatch) -> Result<WindowFile, ReadError> {
    read_bytes(written(batch))
}

/// `batch` with some columns replaced, or taken out.
fn with(batch: &RecordBatch, changes: Vec<(&str, Option<ArrayRef>)>) -> RecordBatch {
    let schema = batch.schema();
    let mut fields: Vec<Field> = Vec::new();
    let mut columns: Vec<ArrayRef> = Vec::new();
    for (field, column) in schema.fields().iter().zip(batch.columns()) {
        let change = changes.iter().find(|(name, _)| name == field.name());
        match change {
            Some((_, None)) => {}
            Some((name, Some(column))) => {
                fields.push(Field::new(*name, column.data_type().clone(), true));
                columns.push(Arc::clone(column));
            }
            None => {
                fields.push(field.as_ref().clone());
                columns.push(Arc::clone(column));
            }
        }
    }
    RecordBatch::try_new(Arc::new(Schema::new(fields).with_metadata(schema.metadata().clone())), columns).unwrap()
}

/// `structure` with some members replaced, or taken out.
fn with_members(structure: &StructArray, changes: &[(&str, Option<ArrayRef>)]) -> StructArray {
    let mut fields: Vec<Field> = Vec::new();
    let mut columns: Vec<ArrayRef> = Vec::new();
    for (field, column) in structure.fields().iter().zip(structure.columns()) {
        match changes.iter().find(|(name, _)| name == field.name()) {
            Some((_, None)) => {}
            Some((name, Some(column))) => {
                fields.push(Field::new(*name, column.data_type().clone(), true));
                columns.push(Arc::clone(column));
            }
            None => {
                fields.push(field.as_ref().clone());
                columns.push(Arc::clone(column));
            }
        }
    }
    StructArray::new(Fields::from(fields), columns, structure.nulls().cloned())
}

fn with_commit(batch: &RecordBatch, changes: &[(&str, Option<ArrayRef>)]) -> RecordBatch {
    let commit = with_members(batch.column_by_name("commit").unwrap().as_struct(), changes);
    with(batch, vec![("commit", Some(Arc::new(commit)))])
}

fn member(batch: &RecordBatch, name: &str) -> ArrayRef {
    Arc::clone(batch.column_by_name("commit").unwrap().as_struct().column_by_name(name).unwrap())
}

/// All texts as they are, except that of row 1.
fn with_text(column: &ArrayRef, text: Option<&str>) -> ArrayRef {
    let strings = column.as_string::<i32>();
    Arc::new(StringArray::from_iter(strings.iter().enumerate().map(|(row, old)| if row == 1 { text } else { old })))
}

fn without_row_1(length: usize) -> Option<NullBuffer> {
    Some(NullBuffer::from_iter((0..length).map(|row| row != 1)))
}

#[test]
fn the_same_rows_in_any_compression_and_encoding() {
    let (batch, expected) = (batch(), golden("valid"));
    let builder = WriterProperties::builder;
    for properties in [
        builder().set_compression(Compression::UNCOMPRESSED).set_dictionary_enabled(false),
        builder().set_compression(Compression::SNAPPY).set_max_row_group_row_count(Some(5)),
        builder().set_compression(Compression::GZIP(GzipLevel::default())),
        builder().set_compression(Compression::BROTLI(BrotliLevel::default())),
        builder().set_compression(Compression::LZ4_RAW),
        builder().set_compression(Compression::ZSTD(ZstdLevel::try_new(9).unwrap())).set_data_page_row_count_limit(3),
        builder().set_writer_version(WriterVersion::PARQUET_2_0).set_dictionary_enabled(false),
    ] {
        let properties = properties.build();
        let shown = format!("{:?}", properties.compression(&"block".into()));
        assert!(read_bytes(write(&batch, properties)).unwrap() == expected, "{shown}");
    }
}

#[test]
fn the_same_rows_in_other_types_and_orders() {
    let batch = batch();
    let longs = |name: &str| batch.column_by_name(name).unwrap().as_primitive::<Int64Type>().clone();
    let large = |column: &ArrayRef| -> ArrayRef { Arc::new(LargeStringArray::from_iter(column.as_string::<i32>())) };
    let tokens = member(&batch, "tokens");
    let tokens = tokens.as_list::<i32>();
    let ids: Int64Array = tokens.values().as_primitive::<Int32Type>().iter().map(|id| id.map(i64::from)).collect();
    let wide_tokens = LargeListArray::new(
        Arc::new(Field::new("item", DataType::Int64, false)),
        arrow_buffer::OffsetBuffer::new(tokens.offsets().iter().map(|offset| i64::from(*offset)).collect()),
        Arc::new(ids),
        None,
    );
    let rollout = member(&batch, "rollout");
    let rollout = rollout.as_struct();
    let lengths: Int16Array = rollout
        .column_by_name("prompt_length")
        .unwrap()
        .as_primitive::<Int32Type>()
        .iter()
        .map(|length| length.map(|length| i16::try_from(length).unwrap()))
        .collect();
    let rollout = with_members(rollout, &[("prompt_length", Some(Arc::new(lengths)))]);
    let changed = with(
        &batch,
        vec![
            (
                "nonce",
                Some(Arc::new(longs("nonce").iter().map(|v| v.map(|v| v.unsigned_abs())).collect::<UInt64Array>())),
            ),
            (
                "rollout_group",
                Some(Arc::new(longs("rollout_group").iter().map(|v| v.map(|v| v as f64)).collect::<Float64Array>())),
            ),
            (
                "window_start",
                Some(Arc::new(
                    longs("window_start").iter().map(|v| v.map(|v| i32::try_from(v).unwrap())).collect::<Int32Array>(),
                )),
            ),
            ("block_hash", Some(large(batch.column_by_name("block_hash").unwrap()))),
        ],
    );
    let changed = with_commit(
        &changed,
        &[
            ("tokens", Some(Arc::new(wide_tokens))),
            ("commitments", Some(large(&member(&batch, "commitments")))),
            ("rollout", Some(Arc::new(rollout))),
        ],
    );
    // Columns backwards, and required wherever nothing is null.
    let schema = changed.schema();
    let fields: Vec<Field> =
        schema.fields().iter().rev().map(|field| field.as_ref().clone().with_nullable(false)).collect();
    let columns: Vec<ArrayRef> = changed.columns().iter().rev().cloned().collect();
    let schema = Schema::new(fields).with_metadata(schema.metadata().clone());
    let changed = RecordBatch::try_new(Arc::new(schema), columns).unwrap();
    assert!(read(&changed).unwrap() == golden("valid"));
}

#[test]
fn missing_columns_and_nulls_are_kept_for_the_checks() {
    let batch = batch();
    let expected = golden("valid").rows;
    let names = [
        "block",
        "nonce",
        "challenge",
        "use_drand",
        "rollout_index",
        "timestamp",
        "checkpoint_window",
        "rollout_group",
    ];
    let missing = read(&with(&batch, names.iter().map(|name| (*name, None)).collect())).unwrap();
    for (row, expected) in missing.rows.iter().zip(&expected) {
        let holes = ReadRow {
            block: None,
            nonce: None,
            challenge: None,
            use_drand: None,
            rollout_index: None,
            timestamp: None,
            checkpoint_window: None,
            rollout_group: None,
            ..expected.clone()
        };
        assert!(*row == holes);
    }

    let signature = with_text(batch.column_by_name("signature").unwrap(), None);
    let nulls = with(&batch, vec![("signature", Some(signature))]);
    let version = with_text(&member(&batch, "proof_version"), None);
    let nulls = read(&with_commit(
        &nulls,
        &[("proof_version", Some(version)), ("beacon", Some(with_text(&member(&batch, "beacon"), None)))],
    ))
    .unwrap();
    assert_eq!(nulls.rows[1].signature, None);
    assert_eq!(nulls.rows[1].commit.proof_version, None);
    assert_eq!(nulls.rows[1].commit.beacon, Value::Null);
    assert_eq!(nulls.rows[0], expected[0]);
}

#[test]
fn missing_members_of_a_commit_read_as_empty() {
    let names = ["tokens", "commitments", "proof_version", "model", "signature", "beacon", "rollout"];
    let batch = batch();
    for name in names {
        let row = &read(&with_commit(&batch, &[(name, None)])).unwrap().rows[3];
        match name {
            "tokens" => assert_eq!(row.commit.tokens, List::Plain(Vec::new())),
            "commitments" => assert_eq!(row.commit.commitments, Commitments::Sketches(Vec::new())),
            "proof_version" => assert_eq!(row.commit.proof_version, None),
            "model" => assert_eq!((&row.commit.model_name, row.commit.layer_index), (&None, None)),
            "signature" => assert_eq!(row.commit.signature, None),
            "beacon" => assert_eq!(row.commit.beacon, grail_protocol::json::parse("{}").unwrap()),
            _ => {
                assert_eq!(row.commit.rollout.total_reward, None);
                assert_eq!(row.commit.rollout.token_logprobs, List::Plain(Vec::new()));
            }
        }
    }
}

#[test]
fn lists_of_other_things_are_kept_as_values() {
    let batch = batch();
    let tokens = member(&batch, "tokens");
    let tokens = tokens.as_list::<i32>();
    let ids: Int32Array =
        tokens.values().as_primitive::<Int32Type>().iter().enumerate().map(|(at, id)| id.filter(|_| at != 2)).collect();
    let field = Arc::new(Field::new("element", DataType::Int32, true));
    let holes = ListArray::new(field, tokens.offsets().clone(), Arc::new(ids), None);
    let rollout = member(&batch, "rollout");
    let logprobs = rollout.as_struct().column_by_name("token_logprobs").unwrap().as_list::<i32>().clone();
    let wide: Float64Array = logprobs
        .values()
        .as_primitive::<Float32Type>()
        .iter()
        .map(|logprob| logprob.map(|logprob| f64::from(logprob) - 0.1))
        .collect();
    let field = Arc::new(Field::new("element", DataType::Float64, true));
    let wide = ListArray::new(field, logprobs.offsets().clone(), Arc::new(wide), None);
    let rollout = with_members(rollout.as_struct(), &[("token_logprobs", Some(Arc::new(wide)))]);
    let file =
        read(&with_commit(&batch, &[("tokens", Some(Arc::new(holes))), ("rollout", Some(Arc::new(rollout)))])).unwrap();
    let List::Other(ids) = &file.rows[0].commit.tokens else { panic!("{:?}", file.rows[0].commit.tokens) };
    assert_eq!(ids[2], Value::Null);
    assert!(ids[1].as_i64().is_some());
    assert!(matches!(file.rows[1].commit.tokens, List::Plain(_)));
    let List::Other(logprobs) = &file.rows[0].commit.rollout.token_logprobs else { panic!("binary64 was narrowed") };
    assert_eq!(logprobs[0], Value::Float(-0.1));
}

#[test]
fn what_does_not_convert_makes_a_file_absent() {
    let batch = batch();
    let rows = batch.num_rows();
    let commit = batch.column_by_name("commit").unwrap().as_struct();
    let null_commit = StructArray::new(commit.fields().clone(), commit.columns().to_vec(), without_row_1(rows));
    let null_member = |name: &str| -> ArrayRef {
        let column = member(&batch, name);
        let column = column.as_struct();
        Arc::new(StructArray::new(column.fields().clone(), column.columns().to_vec(), without_row_1(rows)))
    };
    let tokens = member(&batch, "tokens");
    let tokens = tokens.as_list::<i32>();
    let field = Arc::new(Field::new("element", DataType::Int32, true));
    let null_tokens = ListArray::new(field, tokens.offsets().clone(), Arc::clone(tokens.values()), without_row_1(rows));
    let text = |name: &str, text: &str| vec![(name.to_owned(), with_text(&member(&batch, name), Some(text)))];
    let commits = [
        text("commitments", "[{\"sketch\": 1}"),
        text("commitments", ""),
        text("beacon", "{randomness: 1}"),
        vec![("rollout".to_owned(), null_member("rollout"))],
        vec![("model".to_owned(), null_member("model"))],
        vec![("tokens".to_owned(), Arc::new(null_tokens) as ArrayRef)],
    ];
    let mut files: Vec<RecordBatch> = commits
        .into_iter()
        .map(|changes| {
            let changes: Vec<_> =
                changes.iter().map(|(name, column)| (name.as_str(), Some(Arc::clone(column)))).collect();
            with_commit(&batch, &changes)
        })
        .collect();
    files.push(with(&batch, vec![("commit", Some(Arc::new(null_commit)))]));
    files.push(with(&batch, vec![("commit", None)]));
    let with_metadata = |key: &str, text: &str| {
        let mut metadata: std::collections::HashMap<String, String> = batch.schema().metadata().clone().into();
        metadata.insert(key.to_owned(), text.to_owned());
        let schema = Schema::new(batch.schema().fields().clone()).with_metadata(metadata);
        RecordBatch::try_new(Arc::new(schema), batch.columns().to_vec()).unwrap()
    };
    files.push(with_metadata("window_start", "3600000.0"));
    files.push(with_metadata("inference_count", ""));
    files.push(with_metadata("timestamp", "soon"));
    for (index, batch) in files.iter().enumerate() {
        match read(batch) {
            Err(ReadError::Absent { .. }) => {}
            other => panic!("file {index}: {other:?}"),
        }
    }

    // Damage comes first, wherever it is: here a null group in a row group after the one with the bad text.
    let groups = batch.column_by_name("rollout_group").unwrap().as_primitive::<Int64Type>();
    let groups: Int64Array = groups.iter().enumerate().map(|(row, group)| group.filter(|_| row != rows - 1)).collect();
    let both = with(&files[0], vec![("rollout_group", Some(Arc::new(groups)))]);
    let properties = WriterProperties::builder().set_max_row_group_row_count(Some(8)).build();
    assert!(matches!(read_bytes(write(&both, properties)), Err(ReadError::Corrupt { .. })));
}

#[test]
fn metadata_in_the_embedded_schema_alone_is_enough() {
    use parquet::arrow::arrow_writer::ArrowWriterOptions;
    // The library's own writer stores it there and nowhere else.
    let batch = batch();
    let mut file = Vec::new();
    let mut writer = ArrowWriter::try_new_with_options(&mut file, batch.schema(), ArrowWriterOptions::new()).unwrap();
    writer.write(&batch).unwrap();
    writer.close().unwrap();
    assert_eq!(read_bytes(file).unwrap().metadata, golden("valid").metadata);
}
