//! The crate's unsafe code outside [`crate::cuda`]: mapping files, bytes of tensors, loading libtorch's CUDA library, asking it
//! for its memory, and a loop for processors with fused multiply-add.

use std::ffi::{CStr, CString};
use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use memmap2::Mmap;
use tch::{Device, Tensor};

use crate::bf16_cpu;
use crate::layers::Network;

/// Maps a file read-only.
pub(crate) fn map_file(file: &File) -> std::io::Result<Mmap> {
    // SAFETY: the bytes must not change while they are mapped. A checkpoint's files are written under another name, appear by
    // rename and are never written again (the checkpoint installer upholds this); a file that somebody truncates all the same
    // ends the process with SIGBUS, which the supervisor treats as a crash of the worker. Nothing but plain bytes is read.
    // JUSTIFICATION: reading 15 GB into memory first costs seconds and doubles the peak memory of a load.
    unsafe { Mmap::map(file) }
}

/// Loads a library for the whole process, its symbols visible to all that are loaded.
///
/// # Errors
/// The dynamic linker's text.
pub(crate) fn load_globally(library: &Path) -> Result<(), String> {
    let name = CString::new(library.as_os_str().as_bytes()).map_err(|error| error.to_string())?;
    // SAFETY: `name` is a valid C string that outlives the call. The library's constructors run; they are libtorch's own
    // registrations, and the caller has checked that the library is of the build that this program is linked with.
    // JUSTIFICATION: one binary for CPU and GPU; linking libtorch_cuda.so would make the CUDA libraries a condition to start.
    let handle = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
    if !handle.is_null() {
        // Never closed: libtorch keeps pointers into it.
        return Ok(());
    }
    // SAFETY: `dlerror` returns null or a C string that stays valid until the next call of the dl functions on this thread.
    let text = unsafe {
        let error = libc::dlerror();
        (!error.is_null()).then(|| CStr::from_ptr(error).to_string_lossy().into_owned())
    };
    Err(text.unwrap_or_else(|| "dlopen failed without a reason".to_owned()))
}

/// Free and total bytes of a CUDA device, of the calling thread's current one without `device`; `None` if the CUDA runtime is not
/// loaded or refuses.
pub(crate) fn cuda_memory(device: Option<usize>) -> Option<(usize, usize)> {
    type MemGetInfo = unsafe extern "C" fn(*mut usize, *mut usize) -> libc::c_int;
    type GetDevice = unsafe extern "C" fn(*mut libc::c_int) -> libc::c_int;
    type SetDevice = unsafe extern "C" fn(libc::c_int) -> libc::c_int;
    let mem_get_info = runtime_symbol(c"cudaMemGetInfo")?;
    // SAFETY: `cudaError_t cudaMemGetInfo(size_t*, size_t*)` is its signature in every version of the runtime, and
    // `cudaError_t` is a C enum.
    let mem_get_info = unsafe { std::mem::transmute::<*mut libc::c_void, MemGetInfo>(mem_get_info) };
    let mut before = 0;
    // Only if it is another one: choosing a device makes a context on it, which takes its memory.
    let mut is_other = false;
    if let Some(device) = device {
        let (get, set) = (runtime_symbol(c"cudaGetDevice")?, runtime_symbol(c"cudaSetDevice")?);
        let device = libc::c_int::try_from(device).ok()?;
        // SAFETY: `cudaError_t cudaGetDevice(int*)` and `cudaError_t cudaSetDevice(int)`, as above; the pointer is valid for a
        // write during the call.
        let status = unsafe {
            let get = std::mem::transmute::<*mut libc::c_void, GetDevice>(get);
            let set = std::mem::transmute::<*mut libc::c_void, SetDevice>(set);
            let status = get(&raw mut before);
            is_other = before != device;
            if status == 0 && is_other { set(device) } else { status }
        };
        if status != 0 {
            return None;
        }
    }
    let (mut free, mut total) = (0, 0);
    // SAFETY: both pointers are valid for writes during the call.
    let status = unsafe { mem_get_info(&raw mut free, &raw mut total) };
    if is_other {
        let set = runtime_symbol(c"cudaSetDevice")?;
        // SAFETY: as above; the number is one that the runtime gave.
        unsafe { std::mem::transmute::<*mut libc::c_void, SetDevice>(set)(before) };
    }
    (status == 0).then_some((free, total))
}

/// A function of the CUDA runtime, if that is loaded.
fn runtime_symbol(name: &CStr) -> Option<*mut libc::c_void> {
    // SAFETY: the name is a C string. Whatever library defines it, it is the CUDA runtime's: nobody else has such names.
    // JUSTIFICATION: the bindings of libtorch do not expose its counters of device memory.
    let symbol = unsafe { libc::dlsym(libc::RTLD_DEFAULT, name.as_ptr()) };
    (!symbol.is_null()).then_some(symbol)
}

/// Bytes of a tensor that lies in host memory, end to end; `None` of any other.
pub(crate) fn host_bytes(tensor: &Tensor) -> Option<&[u8]> {
    if tensor.device() != Device::Cpu || !tensor.is_contiguous() {
        return None;
    }
    if tensor.numel() == 0 {
        return Some(&[]);
    }
    // SAFETY: a contiguous tensor's elements lie behind its pointer in one piece of storage, which the tensor keeps alive for the
    // borrow; any byte is a `u8`. Nobody writes meanwhile: weights are changed through `Frozen::exclusive` only.
    // JUSTIFICATION: a checksum of 15 GB would copy them all first, or compute in wide integers at a tenth of the speed.
    Some(unsafe { std::slice::from_raw_parts(tensor.data_ptr().cast::<u8>(), byte_count(tensor)) })
}

/// The same to be written, of a tensor whose storage nobody else has.
pub(crate) fn host_bytes_mut(tensor: &mut Tensor) -> Option<&mut [u8]> {
    if tensor.device() != Device::Cpu || !tensor.is_contiguous() || tensor.numel() == 0 {
        return None;
    }
    // SAFETY: as in `host_bytes`; the borrow of the tensor is exclusive, and callers pass buffers of their own that share their
    // storage with no other tensor.
    // JUSTIFICATION: files are read into pinned memory in one step; libtorch's constructors would copy them twice.
    Some(unsafe { std::slice::from_raw_parts_mut(tensor.data_ptr().cast::<u8>(), byte_count(tensor)) })
}

fn byte_count(tensor: &Tensor) -> usize {
    tensor.numel() * tensor.kind().elt_size_in_bytes()
}

/// [`bf16_cpu::fused_products`] with the processor's fused multiply-add where it has one; the same bits either way.
pub(crate) fn fused_products(block: &[f32], right: &[f32], sums: &mut [f32]) {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx2,fma")]
        fn fused(block: &[f32], right: &[f32], sums: &mut [f32]) {
            bf16_cpu::fused_products(block, right, sums);
        }
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            // SAFETY: the processor has both features, checked in the line above; the function is safe code otherwise.
            // JUSTIFICATION: without it each product is a call of the C library's `fmaf`, about twenty times slower.
            return unsafe { fused(block, right, sums) };
        }
    }
    bf16_cpu::fused_products(block, right, sums);
}

/// Weights that nothing changes while they are shared, so that threads may read them together.
#[derive(Debug)]
pub(crate) struct Frozen(Network);

// SAFETY: shared, `Frozen` hands out `&Network` only, and every method of `Network` reads its tensors without changing storage or
// metadata (no operation ending in an underscore, no `set_data`, no gradients: they are made without `requires_grad`). What
// changes weights in place goes through `Frozen::exclusive`, which needs the only reference.
// libtorch allows concurrent reads of a tensor, and its reference counts are atomic. `Tensor` is `Send` already.
// JUSTIFICATION: a decoder and a proof share one copy of the weights; a lock around every forward pass would serialise them.
unsafe impl Sync for Frozen {}

impl Frozen {
    pub(crate) fn new(network: Network) -> Self {
        Self(network)
    }

    /// The network for somebody who changes its tensors in place. Nobody reads them meanwhile: the borrow is exclusive, and no
    /// tensor that shares their storage is handed out of this crate.
    pub(crate) fn exclusive(&mut self) -> &Network {
        &self.0
    }
}

impl std::ops::Deref for Frozen {
    type Target = Network;
    fn deref(&self) -> &Network {
        &self.0
    }
}
