//! Writes rows in the formats that data sets come in.

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;
use std::sync::Arc;

use arrow_array::builder::{LargeListBuilder, LargeStringBuilder, ListBuilder, StringBuilder};
use arrow_array::types::Int32Type;
use arrow_array::{ArrayRef, DictionaryArray, Int32Array, Int64Array, LargeStringArray, RecordBatch, StringArray};
use arrow_ipc::writer::StreamWriter;
use flate2::read::MultiGzDecoder;
use grail_environments::math::stand_in_rows;
use grail_environments::{Split, gsm8k, humaneval, mbpp};
use parquet::arrow::ArrowWriter;
use parquet::basic::Compression;
use parquet::file::properties::WriterProperties;
use serde_json::{Map, Value, json};

pub type Rows = Vec<Map<String, Value>>;

/// How columns are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Utf8, list, int32.
    Plain,
    /// LargeUtf8, large list, int64.
    Large,
    /// Texts as places in a dictionary.
    Dictionary,
}

impl Form {
    pub const ALL: [Self; 3] = [Self::Plain, Self::Large, Self::Dictionary];
}

fn rows_of(gzip: &[u8]) -> Rows {
    let mut text = String::new();
    MultiGzDecoder::new(gzip).read_to_string(&mut text).expect("the copies are gzip");
    text.lines().map(|line| serde_json::from_str(line).expect("the copies are JSON lines")).collect()
}

pub fn gsm8k_train() -> Rows {
    rows_of(gsm8k::EMBEDDED_TRAIN)
}

pub fn gsm8k_test() -> Rows {
    rows_of(&std::fs::read(grail_golden::path("environments/data/gsm_test.jsonl.gz")).expect("the copy is readable"))
}

pub fn humaneval() -> Rows {
    rows_of(humaneval::EMBEDDED)
}

/// Rows of MBPP with the given numbers.
pub fn mbpp(numbers: std::ops::RangeInclusive<i64>) -> Rows {
    let is_asked = |row: &Map<String, Value>| row["task_id"].as_i64().is_some_and(|number| numbers.contains(&number));
    rows_of(mbpp::EMBEDDED).into_iter().filter(is_asked).collect()
}

/// Rows of each subset of the stand-in for MATH.
pub fn math(split: Split) -> Vec<Rows> {
    let row = |row: &grail_environments::math::MathRow| {
        let value = json!({
            "problem": *row.problem, "level": *row.level, "type": *row.subject, "solution": *row.solution,
        });
        value.as_object().expect("it was made as an object").clone()
    };
    stand_in_rows(split).iter().map(|rows| rows.iter().map(row).collect()).collect()
}

fn column(rows: &[Map<String, Value>], name: &str, form: Form) -> ArrayRef {
    let cells = rows.iter().map(|row| &row[name]);
    match &rows[0][name] {
        Value::String(_) => {
            let texts = cells.map(Value::as_str);
            match form {
                Form::Plain => Arc::new(texts.collect::<StringArray>()),
                Form::Large => Arc::new(texts.collect::<LargeStringArray>()),
                Form::Dictionary => Arc::new(texts.collect::<DictionaryArray<Int32Type>>()),
            }
        }
        Value::Number(_) => {
            let numbers = cells.map(Value::as_i64);
            match form {
                Form::Large => Arc::new(numbers.collect::<Int64Array>()),
                _ => {
                    Arc::new(numbers.map(|cell| cell.map(|n| i32::try_from(n).expect("small"))).collect::<Int32Array>())
                }
            }
        }
        _ => lists(cells, form),
    }
}

fn lists<'r>(cells: impl Iterator<Item = &'r Value>, form: Form) -> ArrayRef {
    let texts = |cell: &'r Value| cell.as_array().expect("a list").iter().map(Value::as_str);
    if form == Form::Large {
        let mut lists = LargeListBuilder::new(LargeStringBuilder::new());
        cells.for_each(|cell| lists.append_value(texts(cell)));
        return Arc::new(lists.finish());
    }
    let mut lists = ListBuilder::new(StringBuilder::new());
    cells.for_each(|cell| lists.append_value(texts(cell)));
    Arc::new(lists.finish())
}

pub fn batch(rows: &[Map<String, Value>], form: Form) -> RecordBatch {
    let columns = rows[0].keys().map(|name| (name, column(rows, name, form)));
    RecordBatch::try_from_iter(columns).expect("all columns have one length")
}

/// Writes to `path`, after making its folder.
fn create(path: &Path) -> File {
    std::fs::create_dir_all(path.parent().expect("a file lies in a folder")).expect("the folder can be made");
    File::create(path).expect("the file can be made")
}

pub fn write_parquet(path: &Path, rows: &[Map<String, Value>], form: Form, compression: Compression) {
    let batch = batch(rows, form);
    let properties = WriterProperties::builder().set_compression(compression).set_max_row_group_row_count(Some(500));
    let mut writer = ArrowWriter::try_new(create(path), batch.schema(), Some(properties.build())).expect("it is open");
    writer.write(&batch).expect("rows are written");
    writer.close().expect("the file is finished");
}

/// Writes `rows` as an Arrow stream of several batches.
pub fn write_stream(path: &Path, rows: &[Map<String, Value>], form: Form) {
    let batch = batch(rows, form);
    let mut writer = StreamWriter::try_new(create(path), &batch.schema()).expect("it is open");
    for start in (0..batch.num_rows()).step_by(400) {
        writer.write(&batch.slice(start, 400.min(batch.num_rows() - start))).expect("rows are written");
    }
    writer.finish().expect("the stream is finished");
}

pub fn write_lines(path: &Path, rows: &[Map<String, Value>]) {
    let mut file = create(path);
    for row in rows {
        writeln!(file, "{}", Value::Object(row.clone())).expect("the line is written");
    }
}
