//! The real model behind the scheduler. The only module here that uses libtorch.

use std::path::Path;
use std::sync::Arc;

use grail_model::generate::{DecodeError, Decoder};
use grail_model::{Device, Dtype, LoadOptions, Model};
use grail_protocol::ids::TokenId;

use super::backend::{BackendError, DecodeBackend};

/// How much room a decoder gets.
#[derive(Debug, Clone, Copy)]
pub struct DecoderOptions {
    pub slots: usize,
    pub context_length: usize,
    /// `None` = single precision.
    pub dtype: Option<Dtype>,
}

/// A folder that did not become a decoder.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LoadFailure {
    #[error("load the model")]
    Model(#[from] grail_model::LoadError),
    #[error("make room for {slots} sequences of {context_length} tokens")]
    Room {
        slots: usize,
        context_length: usize,
        #[source]
        source: DecodeError,
    },
}

/// Loads a folder onto the CPU.
///
/// # Errors
/// [`LoadFailure`]
pub fn load(folder: &Path, options: DecoderOptions) -> Result<Box<dyn DecodeBackend>, LoadFailure> {
    let on_cpu = LoadOptions { dtype: options.dtype, ..LoadOptions::on(Device::Cpu) };
    let model = Arc::new(Model::load(folder, &on_cpu)?);
    let DecoderOptions { slots, context_length, .. } = options;
    let decoder = Decoder::new(model, slots, context_length).map_err(|source| LoadFailure::Room {
        slots,
        context_length,
        source,
    })?;
    Ok(Box::new(TorchBackend { decoder }))
}

#[derive(Debug)]
struct TorchBackend {
    decoder: Decoder,
}

fn failed(operation: &'static str) -> impl Fn(DecodeError) -> BackendError {
    move |error| {
        let causes = std::iter::successors(Some(&error as &dyn std::error::Error), |error| error.source());
        let detail = causes.map(ToString::to_string).collect::<Vec<_>>().join(": ");
        BackendError { operation, detail }
    }
}

impl DecodeBackend for TorchBackend {
    fn vocab_size(&self) -> usize {
        self.decoder.model().config().vocab_size
    }

    fn slots(&self) -> usize {
        self.decoder.slots()
    }

    fn prefill(&mut self, slot: usize, tokens: &[TokenId]) -> Result<Vec<f32>, BackendError> {
        self.decoder.prefill(slot, tokens).map_err(failed("prefill"))
    }

    fn copy_prefix(&mut self, from: usize, to: usize, tokens: usize) -> Result<(), BackendError> {
        self.decoder.copy_prefix(from, to, tokens).map_err(failed("copy a prefix"))
    }

    fn step(&mut self, batch: &[(usize, TokenId)], logits: &mut Vec<f32>) -> Result<(), BackendError> {
        *logits = self.decoder.step(batch).map_err(failed("decode"))?.into_flat();
        Ok(())
    }

    fn release(&mut self, slot: usize) {
        self.decoder.release(slot);
    }
}
