//! Attention of packed sequences: which kernel it is by, and libtorch's kernels for sequences of various lengths.

use std::fmt;
use std::path::Path;

use tch::{Kind, TchError, Tensor};

use super::ffi::{self, VarlenKernel};
use super::hopper::Hopper;
use super::kernels::Kernels;
use super::layout::Layout;
use crate::attention::HeadShape;

/// The operators' schemas as the C++ shim was written for; another one means another libtorch.
const FLASH_SCHEMA: &str = "aten::_flash_attention_forward(Tensor query, Tensor key, Tensor value, Tensor? cum_seq_q, Tensor? cum_seq_k, SymInt max_q, SymInt max_k, float dropout_p, bool is_causal, bool return_debug_mask, *, float? scale=None, SymInt? window_size_left=None, SymInt? window_size_right=None, Tensor? seqused_k=None, Tensor? alibi_slopes=None) -> (Tensor output, Tensor softmax_logsumexp, Tensor rng_state, Tensor unused, Tensor debug_attn_mask)";
const EFFICIENT_SCHEMA: &str = "aten::_efficient_attention_forward(Tensor query, Tensor key, Tensor value, Tensor? bias, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt? max_seqlen_q, SymInt? max_seqlen_k, float dropout_p, int custom_mask_type, bool compute_log_sumexp=False, *, float? scale=None, Tensor? seqlen_k=None, int? window_size=None) -> (Tensor output, Tensor logsumexp, Tensor philox_seed, Tensor philox_offset, SymInt max_seqlen_batch_q, SymInt max_seqlen_batch_k)";

/// How a batch attends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Attention {
    /// All sequences in one call of the project's own kernel.
    Hopper(Hopper),
    /// All sequences in one call of libtorch.
    Varlen(VarlenKernel),
    /// One call for each sequence, with a mask where it continues another.
    PerSequence,
}

impl fmt::Display for Attention {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Hopper(_) => "hopper",
            Self::Varlen(VarlenKernel::Flash) => "flash",
            Self::Varlen(VarlenKernel::Efficient) => "efficient",
            Self::PerSequence => "per sequence",
        })
    }
}

impl Attention {
    /// The fastest that can be had; a warning says what is missing.
    pub(super) fn choose(libraries: &Path, device: usize, kernels: &Kernels) -> Self {
        let flash = match Self::flash() {
            Ok(flash) => flash,
            Err(reason) => {
                tracing::warn!(
                    reason,
                    "Attention of packed sequences is left out; each sequence has a call of its own."
                );
                return Self::PerSequence;
            }
        };
        let lane = kernels.enter().map_err(|error| crate::error::TorchError::from(error).detail);
        match lane.and_then(|lane| Hopper::start(libraries, device, &kernels.dimensions, lane)) {
            Ok(own) => own.map_or(flash, Self::Hopper),
            Err(reason) => {
                tracing::warn!(
                    reason,
                    "The attention kernel for Hopper is left out; libtorch's takes its place and is slower."
                );
                flash
            }
        }
    }

    /// The flash kernel, or why it cannot be used.
    ///
    /// # Errors
    /// The operator is missing, has another schema or no CUDA kernel.
    pub(crate) fn flash() -> Result<Self, String> {
        check(VarlenKernel::Flash)?;
        Ok(Self::Varlen(VarlenKernel::Flash))
    }
}

/// Whether the running libtorch has the operator that the shim calls.
fn check(kernel: VarlenKernel) -> Result<(), String> {
    let (name, expected) = match kernel {
        VarlenKernel::Flash => (c"aten::_flash_attention_forward", FLASH_SCHEMA),
        VarlenKernel::Efficient => (c"aten::_efficient_attention_forward", EFFICIENT_SCHEMA),
    };
    let (found, has_cuda) = ffi::operator_schema(name).map_err(|error| crate::error::TorchError::from(error).detail)?;
    if found != expected {
        return Err(format!("libtorch has {found}, {expected} is expected"));
    }
    if has_cuda { Ok(()) } else { Err(format!("{} has no CUDA kernel", name.to_string_lossy())) }
}

/// Attends all sequences of a batch in one call.
///
/// * `query`: `[rows, heads, head_dim]`, rows of any stride; `keys_values`: `[key rows, 2, kv_heads, head_dim]`, as
///   `layout` orders them.
///
/// Returns `[rows, heads · head_dim]`.
pub(crate) fn attend(
    kernel: VarlenKernel,
    query: &Tensor,
    keys_values: &Tensor,
    layout: &Layout,
    shape: HeadShape,
) -> Result<Tensor, TchError> {
    let [query_offsets, key_offsets] = layout.offsets()?;
    let (key, value) = (keys_values.f_select(1, 0)?, keys_values.f_select(1, 1)?);
    let most = (layout.most_queries, layout.most_keys);
    let rows = query.size()[0];
    let attended = match kernel {
        VarlenKernel::Flash => {
            ffi::varlen_attention(kernel, [query, &key, &value, &query_offsets, &key_offsets], most, shape.scale())?
        }
        VarlenKernel::Efficient => {
            let repeated = |x: &Tensor| -> Result<Tensor, TchError> {
                let (rows, repeats) = (x.size()[0], shape.heads / shape.kv_heads);
                x.f_unsqueeze(2)?.f_expand([rows, shape.kv_heads, repeats, shape.head_dim], false)?.f_reshape([
                    1,
                    rows,
                    shape.heads,
                    shape.head_dim,
                ])
            };
            let query = query.f_unsqueeze(0)?;
            ffi::varlen_attention(
                kernel,
                [&query, &repeated(&key)?, &repeated(&value)?, &query_offsets, &key_offsets],
                most,
                shape.scale(),
            )?
        }
    };
    debug_assert_eq!(attended.kind(), Kind::BFloat16, "attention keeps the kind of its queries");
    attended.f_reshape([rows, shape.heads * shape.head_dim])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_linked_libtorch_has_both_operators_as_they_are_called() {
        for kernel in [VarlenKernel::Flash, VarlenKernel::Efficient] {
            // Without the CUDA library there is no kernel, and that is the only thing missing.
            match check(kernel) {
                Ok(()) => {}
                Err(reason) => assert!(reason.ends_with("has no CUDA kernel"), "{reason}"),
            }
        }
    }

    #[test]
    fn an_operator_that_does_not_exist_is_refused_by_name() {
        let error = ffi::operator_schema(c"aten::_no_such_attention").unwrap_err().to_string();
        assert!(error.contains("aten::_no_such_attention"), "{error}");
    }

    #[test]
    fn on_a_cpu_the_call_comes_back_with_libtorchs_text() {
        let x = Tensor::zeros([4, 2, 8], (Kind::BFloat16, tch::Device::Cpu));
        let offsets = Tensor::from_slice(&[0_i32, 4]);
        let result = ffi::varlen_attention(VarlenKernel::Flash, [&x, &x, &x, &offsets, &offsets], (4, 4), 1.0);
        let error = result.unwrap_err().to_string();
        assert!(error.contains("_flash_attention_forward"), "{error}");
    }
}
