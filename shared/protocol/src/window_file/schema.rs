//! Columns of the window file, in the order in which they are written.

use std::sync::{Arc, LazyLock};

use arrow_schema::{DataType, Field, Fields, Schema, SchemaRef};

/// Keys of the schema-level metadata.
pub const METADATA_KEYS: [&str; 5] = ["wallet", "window_start", "window_length", "inference_count", "timestamp"];

/// The schema without metadata: 15 columns, all nullable, lists in the three-level layout `x.list.element`.
#[must_use]
pub fn arrow_schema() -> SchemaRef {
    static SCHEMA: LazyLock<SchemaRef> = LazyLock::new(|| {
        Arc::new(Schema::new(vec![
            field("window_start", DataType::Int64),
            field("block", DataType::Int64),
            field("nonce", DataType::Int64),
            field("block_hash", DataType::Utf8),
            field("randomness", DataType::Utf8),
            field("use_drand", DataType::Boolean),
            field("rollout_group", DataType::Int64),
            field("rollout_index", DataType::Int32),
            field("total_in_group", DataType::Int32),
            field("checkpoint_window", DataType::Int64),
            field("commit", DataType::Struct(commit_fields())),
            field("timestamp", DataType::Float64),
            field("challenge", DataType::Utf8),
            field("hotkey", DataType::Utf8),
            field("signature", DataType::Utf8),
        ]))
    });
    Arc::clone(&SCHEMA)
}

pub(super) fn commit_fields() -> Fields {
    Fields::from(vec![
        field("tokens", DataType::List(element(DataType::Int32))),
        field("commitments", DataType::Utf8),
        field("proof_version", DataType::Utf8),
        field("model", DataType::Struct(model_fields())),
        field("signature", DataType::Utf8),
        field("beacon", DataType::Utf8),
        field("rollout", DataType::Struct(rollout_fields())),
    ])
}

pub(super) fn model_fields() -> Fields {
    Fields::from(vec![field("name", DataType::Utf8), field("layer_index", DataType::Int32)])
}

pub(super) fn rollout_fields() -> Fields {
    Fields::from(vec![
        field("total_reward", DataType::Float64),
        field("advantage", DataType::Float64),
        field("success", DataType::Boolean),
        field("token_logprobs", DataType::List(element(DataType::Float32))),
        field("prompt_length", DataType::Int32),
        field("completion_length", DataType::Int32),
    ])
}

/// Element of a list; Arrow's Parquet writers name it `element` inside a group `list`.
pub(super) fn element(data_type: DataType) -> Arc<Field> {
    Arc::new(field("element", data_type))
}

fn field(name: &str, data_type: DataType) -> Field {
    Field::new(name, data_type, true)
}
