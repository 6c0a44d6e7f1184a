//! Where a model lies, in which precision, and with how many threads.

use std::fmt;
use std::str::FromStr;
use std::sync::Once;

use tch::Kind;

use crate::error::LoadError;
use crate::safetensors::FileDtype;

/// A device by name: `cpu`, `cuda` or `cuda:N`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Device {
    Cpu,
    /// The n-th visible GPU.
    Cuda(usize),
}

/// A text that names no device.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no device: cpu, cuda or cuda:N is expected")]
pub struct NotADevice(pub String);

impl FromStr for Device {
    type Err = NotADevice;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "cpu" => Ok(Self::Cpu),
            "cuda" => Ok(Self::Cuda(0)),
            other => other
                .strip_prefix("cuda:")
                .filter(|index| index.bytes().all(|byte| byte.is_ascii_digit()))
                .and_then(|index| index.parse().ok())
                .map(Self::Cuda)
                .ok_or_else(|| NotADevice(text.to_owned())),
        }
    }
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cpu => f.write_str("cpu"),
            Self::Cuda(index) => write!(f, "cuda:{index}"),
        }
    }
}

impl Device {
    /// bf16 on a GPU and f32 on a CPU, as validators have it.
    #[must_use]
    pub const fn default_dtype(self) -> Dtype {
        match self {
            Self::Cpu => Dtype::F32,
            Self::Cuda(_) => Dtype::Bf16,
        }
    }

    /// Tokens of one packed batch: two groups of usual length on a GPU, whose matrix products want many rows; a GPU with less
    /// memory takes what fits.
    #[must_use]
    pub const fn default_batch_tokens(self) -> usize {
        match self {
            Self::Cpu => 16_384,
            Self::Cuda(_) => 32_768,
        }
    }

    /// # Errors
    /// [`LoadError::NoDevice`] for a GPU that libtorch does not see.
    pub(crate) fn check(self) -> Result<(), LoadError> {
        let devices = usize::try_from(tch::Cuda::device_count()).unwrap_or_default();
        match self {
            Self::Cuda(index) if index >= devices => Err(LoadError::NoDevice { device: self, devices }),
            Self::Cpu | Self::Cuda(_) => Ok(()),
        }
    }

    /// Waits for all work on a GPU; a CPU is never behind.
    pub(crate) fn synchronize(self) {
        if let Self::Cuda(index) = self {
            tch::Cuda::synchronize(index as i64);
        }
    }

    pub(crate) const fn torch(self) -> tch::Device {
        match self {
            Self::Cpu => tch::Device::Cpu,
            Self::Cuda(index) => tch::Device::Cuda(index),
        }
    }
}

/// Precision of weights and activations.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Dtype {
    F32,
    Bf16,
}

/// A text that names no precision.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no dtype: float32 or bfloat16 is expected")]
pub struct NotADtype(pub String);

impl FromStr for Dtype {
    type Err = NotADtype;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "float32" | "f32" => Ok(Self::F32),
            "bfloat16" | "bf16" => Ok(Self::Bf16),
            other => Err(NotADtype(other.to_owned())),
        }
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "float32",
            Self::Bf16 => "bfloat16",
        })
    }
}

impl Dtype {
    pub(crate) const fn kind(self) -> Kind {
        match self {
            Self::F32 => Kind::Float,
            Self::Bf16 => Kind::BFloat16,
        }
    }

    /// The same in a file.
    pub(crate) const fn file(self) -> FileDtype {
        match self {
            Self::F32 => FileDtype::F32,
            Self::Bf16 => FileDtype::Bf16,
        }
    }
}

/// Threads of libtorch inside one operation; between operations there is one, since a forward pass is a chain.
///
/// Call it before the first model is loaded: libtorch's pools are made once.
pub fn set_threads(threads: usize) {
    static INTER_OP: Once = Once::new();
    let threads = i32::try_from(threads.max(1)).unwrap_or(i32::MAX);
    tch::set_num_threads(threads);
    INTER_OP.call_once(|| {
        // libtorch refuses a second call, and one after its pool has started.
        if tch::get_num_interop_threads() != 1 {
            tch::set_num_interop_threads(1);
        }
    });
}

/// Threads for work on the host that libtorch does not do: as many as an operation of its own may have.
pub(crate) fn host_threads() -> usize {
    usize::try_from(tch::get_num_threads()).unwrap_or(1).max(1)
}
