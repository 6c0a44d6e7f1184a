//! Bytes of files into weights: several threads, each with a small buffer, which is pinned where a GPU reads from it.

use std::sync::{Mutex, PoisonError};

use tch::{Device, Kind, TchError, Tensor};

use crate::cuda::{self, on_loading_stream};
use crate::device::host_threads;
use crate::ffi;

/// Bytes that one step moves to a GPU: far more than a transfer needs to run at full speed, and few enough that what the threads hold
/// together may stay in a server's cache between the read and the transfer.
const GPU_STEP_BYTES: usize = 1 << 23;
/// The same on a CPU, where the buffer should stay in the cache.
const CPU_STEP_BYTES: usize = 1 << 20;
/// Threads that read for a CPU: memory is the limit there.
const MOST_CPU_THREADS: usize = 4;
/// Threads that read for a GPU: the copy into page-locked memory is the limit, and more of them than on a CPU are needed to keep the
/// bus busy.
const MOST_GPU_THREADS: usize = 8;

/// One tensor to be filled.
#[derive(Debug)]
pub(crate) struct Fill<'b> {
    /// Flat, of any kind and on any device.
    pub to: Tensor,
    /// As many elements, little-endian.
    pub bytes: &'b [u8],
    /// What the bytes are.
    pub kind: Kind,
}

/// Fills tensors, cast to their own kind.
///
/// # Errors
/// [`TchError`]; some of them may be filled then.
pub(crate) fn fill(fills: Vec<Fill<'_>>) -> Result<(), TchError> {
    let device = fills.first().map_or(Device::Cpu, |fill| fill.to.device());
    let (step_bytes, most_threads) = match device {
        Device::Cpu => (CPU_STEP_BYTES, MOST_CPU_THREADS.min(host_threads())),
        _ => (GPU_STEP_BYTES, MOST_GPU_THREADS.min(std::thread::available_parallelism().map_or(1, usize::from))),
    };
    let mut steps = Vec::new();
    for Fill { to, bytes, kind } in fills {
        let width = kind.elt_size_in_bytes();
        let mut first = 0;
        for bytes in bytes.chunks(step_bytes) {
            let count = (bytes.len() / width) as i64;
            steps.push(Fill { to: to.f_narrow(0, first, count)?, bytes, kind });
            first += count;
        }
    }
    let threads = most_threads.min(steps.len());
    let steps = Mutex::new(steps.into_iter());
    std::thread::scope(|scope| {
        let work = || on_loading_stream(device, || take_steps(&steps, device, step_bytes));
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        workers
            .into_iter()
            .try_for_each(|worker| worker.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })
}

/// Memory that `device` reads from: page-locked for a GPU, as far as there is some.
fn buffer_for(device: Device, bytes: usize) -> Result<Tensor, TchError> {
    let pageable = || Tensor::f_empty([bytes as i64], (Kind::Uint8, Device::Cpu));
    if device == Device::Cpu {
        return pageable();
    }
    cuda::pinned(bytes).or_else(|error| {
        tracing::warn!(%error, "No page-locked memory; reading weights is slower.");
        pageable()
    })
}

fn take_steps<'b>(
    steps: &Mutex<impl Iterator<Item = Fill<'b>>>,
    device: Device,
    buffer_bytes: usize,
) -> Result<(), TchError> {
    // Of this thread, like all such guards.
    let _guard = tch::no_grad_guard();
    let mut buffer = buffer_for(device, buffer_bytes)?;
    loop {
        let step = steps.lock().unwrap_or_else(PoisonError::into_inner).next();
        let Some(Fill { mut to, bytes, kind }) = step else { return Ok(()) };
        if let Some(place) = ffi::host_bytes_mut(&mut buffer).and_then(|buffer| buffer.get_mut(..bytes.len())) {
            place.copy_from_slice(bytes);
        }
        // Waits until the bytes have arrived, so the buffer may be used again.
        to.f_copy_(&buffer.f_narrow(0, 0, bytes.len() as i64)?.f_view_dtype(kind)?)?;
    }
}
