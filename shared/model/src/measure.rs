//! What a device can do, measured in this process: the yardstick of a forward pass.

use std::time::{Duration, Instant};

use tch::{Kind, Tensor};

use crate::device::{Device, Dtype};
use crate::error::TorchError;
use crate::layers::Linear;

/// Products that are timed; the median counts.
const TIMED_PRODUCTS: usize = 9;

/// Time that one square matrix product takes, as the forward pass computes its own.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MatrixProduct {
    /// Rows and columns of both factors.
    pub size: usize,
    /// Median of some products behind a warm-up.
    pub time: Duration,
}

impl MatrixProduct {
    /// Measures products of `size` rows and columns.
    ///
    /// # Errors
    /// [`TorchError`], for instance for want of memory.
    pub fn measure(device: Device, dtype: Dtype, size: usize) -> Result<Self, TorchError> {
        let _guard = tch::no_grad_guard();
        let side = size as i64;
        let random = || Tensor::f_randn([side, side], (Kind::Float, device.torch()))?.f_to_kind(dtype.kind());
        let (x, matrix) = (random()?, Linear { weight: random()?, bias: None });
        let mut times = Vec::with_capacity(TIMED_PRODUCTS);
        for round in 0..=TIMED_PRODUCTS {
            device.synchronize();
            let started = Instant::now();
            let product = matrix.forward(&x)?;
            device.synchronize();
            // The first one chooses its kernel and allocates.
            if round > 0 {
                times.push(started.elapsed());
            }
            drop(product);
        }
        times.sort_unstable();
        let time = times.get(times.len() / 2).copied().unwrap_or_default();
        Ok(Self { size, time })
    }

    /// Measures products that follow each other without a pause for about `length`: what a device keeps up when its power or heat
    /// limits it.
    ///
    /// # Errors
    /// As [`MatrixProduct::measure`].
    pub fn measure_sustained(device: Device, dtype: Dtype, size: usize, length: Duration) -> Result<Self, TorchError> {
        let _guard = tch::no_grad_guard();
        let side = size as i64;
        let random = || Tensor::f_randn([side, side], (Kind::Float, device.torch()))?.f_to_kind(dtype.kind());
        let (x, weight, out) = (random()?, random()?.f_tr()?, random()?);
        let products = |count: u32| {
            device.synchronize();
            let started = Instant::now();
            (0..count).try_for_each(|_| x.f_mm_out(&out, &weight).map(drop))?;
            device.synchronize();
            Ok::<_, tch::TchError>(started.elapsed() / count)
        };
        products(1)?;
        let one = products(1)?;
        let count = length.as_secs_f64() / one.as_secs_f64().max(1e-9);
        #[expect(clippy::cast_possible_truncation, reason = "the number is between one and a million")]
        let time = products(count.clamp(1.0, 1e6) as u32)?;
        Ok(Self { size, time })
    }

    /// Floating-point operations a second, a multiplication and an addition as two.
    #[must_use]
    pub fn flop_per_second(&self) -> f64 {
        2.0 * (self.size as f64).powi(3) / self.time.as_secs_f64()
    }
}

/// Memory of a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceMemory {
    /// In use by all processes, as the driver counts it.
    pub used_bytes: u64,
    pub total_bytes: u64,
}

/// Memory of the current CUDA device, which is the first one unless somebody chose another; `None` where the CUDA runtime is not
/// loaded or does not say.
///
/// libtorch keeps what it once allocated, so this is the peak, not what the last pass left.
#[must_use]
pub fn cuda_memory() -> Option<DeviceMemory> {
    let (free, total) = crate::ffi::cuda_memory(None)?;
    Some(DeviceMemory { used_bytes: (total.saturating_sub(free)) as u64, total_bytes: total as u64 })
}

/// Bytes that could still be allocated where a model lies: the driver's count on a GPU, the kernel's `MemAvailable` on a CPU.
///
/// What libtorch keeps of freed GPU memory counts as in use. `None` where nobody says.
#[must_use]
pub fn free_memory(device: Device) -> Option<u64> {
    match device {
        Device::Cpu => {
            let text = std::fs::read_to_string("/proc/meminfo").ok()?;
            let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
            let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
            kib.checked_mul(1_024)
        }
        Device::Cuda(index) => Some(crate::ffi::cuda_memory(Some(index))?.0 as u64),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn products_are_measured_on_the_cpu_in_both_precisions() {
        for dtype in [Dtype::F32, Dtype::Bf16] {
            let measured = MatrixProduct::measure(Device::Cpu, dtype, 64).unwrap();
            assert!(measured.time > Duration::ZERO && measured.flop_per_second() > 0.0);
        }
        assert!(free_memory(Device::Cpu).unwrap() > 0);
        let sustained =
            MatrixProduct::measure_sustained(Device::Cpu, Dtype::F32, 64, Duration::from_millis(2)).unwrap();
        assert!(sustained.time > Duration::ZERO);
        let one_second = MatrixProduct { size: 100, time: Duration::from_secs(1) };
        assert!((one_second.flop_per_second() - 2e6).abs() < 1.0);
    }
}
