//! Foreign functions of the CUDA path: the driver, its run-time compiler, and the C++ shim over libtorch.
//!
//! The driver and the compiler are loaded when a GPU is wanted, like libtorch's CUDA half: neither is a condition to start. What
//! is unsafe about launching a kernel stands with the kernels, which know their arguments.

use std::ffi::{CStr, CString, c_char, c_int, c_uint, c_void};
use std::path::Path;
use std::ptr::{null, null_mut};
use std::sync::OnceLock;

use tch::{TchError, Tensor};

use super::kernels::Shape;

/// Longest text that the shim and the driver are asked for, in bytes.
const TEXT_BYTES: usize = 4096;

/// A library that stays loaded for the life of the process.
struct Library(*mut c_void);

impl Library {
    fn open(name: &Path) -> Result<Self, String> {
        use std::os::unix::ffi::OsStrExt;
        let text = CString::new(name.as_os_str().as_bytes()).map_err(|error| error.to_string())?;
        // SAFETY: `text` is a C string that outlives the call. The constructors that run are the vendor's own.
        // JUSTIFICATION: linking these libraries would make a GPU a condition to start.
        let handle = unsafe { libc::dlopen(text.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        if handle.is_null() { Err(format!("{} cannot be loaded", name.display())) } else { Ok(Self(handle)) }
    }

    /// The function `name`, which must have the type `F`.
    ///
    /// # Safety
    /// `F` is the function pointer type of `name` in the library's headers.
    unsafe fn function<F: Copy>(&self, name: &CStr) -> Result<F, String> {
        // SAFETY: the handle is of a library that is never closed, the name is a C string.
        let symbol = unsafe { libc::dlsym(self.0, name.as_ptr()) };
        if symbol.is_null() {
            return Err(format!("{} is missing", name.to_string_lossy()));
        }
        // SAFETY: a function pointer has the size of a data pointer on every platform that CUDA runs on; the caller vouches for
        // the type.
        Ok(unsafe { std::mem::transmute_copy::<*mut c_void, F>(&symbol) })
    }
}

type Status = c_int;

/// The functions of the driver that are used, as `cuda.h` declares them; their versions by name are those of CUDA 12 and 13.
struct Driver {
    device_get: unsafe extern "C" fn(*mut c_int, c_int) -> Status,
    device_attribute: unsafe extern "C" fn(*mut c_int, c_int, c_int) -> Status,
    retain_context: unsafe extern "C" fn(*mut *mut c_void, c_int) -> Status,
    set_context: unsafe extern "C" fn(*mut c_void) -> Status,
    load_module: unsafe extern "C" fn(*mut *mut c_void, *const c_void) -> Status,
    function: unsafe extern "C" fn(*mut *mut c_void, *mut c_void, *const c_char) -> Status,
    set_function_attribute: unsafe extern "C" fn(*mut c_void, c_int, c_int) -> Status,
    encode_tensor_map: Result<EncodeTensorMap, String>,
    launch: unsafe extern "C" fn(
        *mut c_void,
        c_uint,
        c_uint,
        c_uint,
        c_uint,
        c_uint,
        c_uint,
        c_uint,
        *mut c_void,
        *mut *mut c_void,
        *mut *mut c_void,
    ) -> Status,
    event_create: unsafe extern "C" fn(*mut *mut c_void, c_uint) -> Status,
    event_record: unsafe extern "C" fn(*mut c_void, *mut c_void) -> Status,
    event_query: unsafe extern "C" fn(*mut c_void) -> Status,
    event_synchronize: unsafe extern "C" fn(*mut c_void) -> Status,
    event_destroy: unsafe extern "C" fn(*mut c_void) -> Status,
    error_text: unsafe extern "C" fn(Status, *mut *const c_char) -> Status,
}

/// `cuTensorMapEncodeTiled`: the map, kind of elements, rank, address, sizes, strides, box, steps, interleave, swizzle, promotion in the
/// cache, what is outside.
type EncodeTensorMap = unsafe extern "C" fn(
    *mut TensorMap,
    c_int,
    c_uint,
    *mut c_void,
    *const u64,
    *const u64,
    *const c_uint,
    *const c_uint,
    c_int,
    c_int,
    c_int,
    c_int,
) -> Status;

const NOT_READY: Status = 600;
const MULTIPROCESSORS: c_int = 16;
const CAPABILITY_MAJOR: c_int = 75;
const CAPABILITY_MINOR: c_int = 76;
const EVENT_WITHOUT_TIMING: c_uint = 2;
const MOST_DYNAMIC_SHARED_BYTES: c_int = 8;
/// Of a tensor map: bf16, no interleave, 128-byte swizzle, 256-byte promotion in L2, zeros outside.
const MAP_BF16: c_int = 9;
const MAP_NO_INTERLEAVE: c_int = 0;
const MAP_SWIZZLE_128: c_int = 3;
const MAP_PROMOTION_256: c_int = 3;
const MAP_ZEROS_OUTSIDE: c_int = 0;

impl Driver {
    fn load() -> Result<Self, String> {
        let library = Library::open(Path::new("libcuda.so.1"))?;
        // SAFETY: the types are those of `cuda.h`; pointers to opaque structures are `void` pointers, devices are `int`s.
        unsafe {
            Ok(Self {
                device_get: library.function(c"cuDeviceGet")?,
                device_attribute: library.function(c"cuDeviceGetAttribute")?,
                retain_context: library.function(c"cuDevicePrimaryCtxRetain")?,
                set_context: library.function(c"cuCtxSetCurrent")?,
                load_module: library.function(c"cuModuleLoadData")?,
                function: library.function(c"cuModuleGetFunction")?,
                set_function_attribute: library.function(c"cuFuncSetAttribute")?,
                // Younger than the others, and only kernels for Hopper want it.
                encode_tensor_map: library.function(c"cuTensorMapEncodeTiled"),
                launch: library.function(c"cuLaunchKernel")?,
                event_create: library.function(c"cuEventCreate")?,
                event_record: library.function(c"cuEventRecord")?,
                event_query: library.function(c"cuEventQuery")?,
                event_synchronize: library.function(c"cuEventSynchronize")?,
                event_destroy: library.function(c"cuEventDestroy_v2")?,
                error_text: library.function(c"cuGetErrorString")?,
            })
        }
    }

    fn get() -> Result<&'static Self, TchError> {
        static DRIVER: OnceLock<Result<Driver, String>> = OnceLock::new();
        DRIVER.get_or_init(Self::load).as_ref().map_err(|error| TchError::Torch(format!("CUDA driver: {error}")))
    }

    fn check(&self, status: Status, what: &str) -> Result<(), TchError> {
        if status == 0 {
            return Ok(());
        }
        let mut text = null();
        // SAFETY: the pointer is valid for the write; the driver's texts are static.
        let known = unsafe { (self.error_text)(status, &raw mut text) == 0 && !text.is_null() };
        // SAFETY: the driver gave a C string of static life.
        let text = if known { unsafe { CStr::from_ptr(text) }.to_string_lossy() } else { "unknown error".into() };
        // The words by which errors of the device are told from others.
        Err(TchError::Torch(format!("CUDA error: {text} ({status}) in {what}")))
    }
}

/// The context of one GPU that libtorch uses too.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Context {
    context: *mut c_void,
    device: c_int,
    index: usize,
}

// SAFETY: a context is a handle that the driver lets any thread use; it is retained for the life of the process.
unsafe impl Send for Context {}
// SAFETY: as above.
unsafe impl Sync for Context {}

impl Context {
    /// The primary context of the n-th visible GPU, which libtorch has initialised.
    pub(crate) fn of_device(index: usize) -> Result<Self, TchError> {
        let driver = Driver::get()?;
        let ordinal = c_int::try_from(index).map_err(|error| TchError::Torch(error.to_string()))?;
        let (mut device, mut context) = (0, null_mut());
        // SAFETY: the pointers are valid for writes during the calls. The context is never released: neither is the device.
        driver.check(unsafe { (driver.device_get)(&raw mut device, ordinal) }, "find the device")?;
        // SAFETY: as above.
        driver.check(unsafe { (driver.retain_context)(&raw mut context, device) }, "retain the context")?;
        Ok(Self { context, device, index })
    }

    /// Makes it the context of this thread: libtorch's current device follows.
    pub(crate) fn enter(&self) -> Result<(), TchError> {
        let driver = Driver::get()?;
        // SAFETY: the context was retained and never released.
        driver.check(unsafe { (driver.set_context)(self.context) }, "enter the context")
    }

    /// Compute capability, major and minor.
    pub(crate) fn capability(&self) -> Result<(i32, i32), TchError> {
        Ok((self.attribute(CAPABILITY_MAJOR)?, self.attribute(CAPABILITY_MINOR)?))
    }

    /// Multiprocessors of the device.
    pub(crate) fn multiprocessors(&self) -> Result<i32, TchError> {
        self.attribute(MULTIPROCESSORS)
    }

    fn attribute(&self, number: c_int) -> Result<c_int, TchError> {
        let driver = Driver::get()?;
        let mut value = 0;
        // SAFETY: the pointer is valid for the write.
        let status = unsafe { (driver.device_attribute)(&raw mut value, number, self.device) };
        driver.check(status, "ask what the device is").map(|()| value)
    }

    /// Loads an image of machine code; it stays for the life of the process.
    pub(crate) fn load(&self, image: &[u8]) -> Result<Module, TchError> {
        self.enter()?;
        let driver = Driver::get()?;
        let mut module = null_mut();
        // SAFETY: a cubin names its own length in its header; the compiler wrote it, or the cache whose checksum was right.
        driver.check(unsafe { (driver.load_module)(&raw mut module, image.as_ptr().cast()) }, "load the kernels")?;
        Ok(Module(module))
    }

    /// The stream that libtorch's operations on this GPU go to, on this thread.
    pub(crate) fn stream(&self) -> Result<Stream, TchError> {
        let device = c_int::try_from(self.index).map_err(|error| TchError::Torch(error.to_string()))?;
        let mut stream = null_mut();
        with_error(|error| {
            // SAFETY: both pointers are valid for writes of their sizes during the call.
            let status = unsafe { grail_current_stream(device, &raw mut stream, error.as_mut_ptr(), error.len()) };
            (status == 0).then_some(())
        })?;
        Ok(Stream { stream, context: self.context })
    }
}

/// A loaded image.
#[derive(Debug)]
pub(crate) struct Module(*mut c_void);

// SAFETY: a module is a handle that the driver lets any thread use; it is never unloaded.
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Sync for Module {}

impl Module {
    pub(crate) fn function(&self, name: &CStr) -> Result<Function, TchError> {
        let driver = Driver::get()?;
        let mut function = null_mut();
        // SAFETY: the module is loaded for the life of the process, the name is a C string.
        let status = unsafe { (driver.function)(&raw mut function, self.0, name.as_ptr()) };
        driver.check(status, &format!("find the kernel {}", name.to_string_lossy()))?;
        Ok(Function(function))
    }
}

/// A stream of libtorch's with the context of its device; valid as long as libtorch, which never destroys them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Stream {
    stream: *mut c_void,
    context: *mut c_void,
}

impl Stream {
    /// Makes the stream's context this thread's: libtorch leaves behind the device that it found, which may be another one.
    fn enter(self, driver: &Driver) -> Result<(), TchError> {
        // SAFETY: the context was retained and never released.
        driver.check(unsafe { (driver.set_context)(self.context) }, "enter the context")
    }
}

/// A kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Function(*mut c_void);

// SAFETY: a function is a handle into a module that is never unloaded.
unsafe impl Send for Function {}
// SAFETY: as above.
unsafe impl Sync for Function {}

/// How a kernel fetches boxes of a tensor; a kernel takes it by value, as `CUtensorMap` of `cuda.h`.
#[derive(Debug)]
#[repr(C, align(64))]
pub(crate) struct TensorMap([u64; 16]);

/// A tensor of bf16, the innermost dimension first and without gaps, and the boxes that are fetched or stored of it. `STRIDES` is one less
/// than `RANK`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Mapped<const RANK: usize, const STRIDES: usize> {
    /// In device memory, a multiple of 16.
    pub address: u64,
    /// In elements.
    pub sizes: [u64; RANK],
    /// Of the second dimension and those that follow, in bytes: multiples of 16.
    pub strides: [u64; STRIDES],
    /// In elements.
    pub boxes: [u32; RANK],
}

impl TensorMap {
    /// The map, with 128-byte swizzle. Nothing is read or written through it here.
    ///
    /// # Errors
    /// The driver does not know such maps, or refuses this one.
    pub(crate) fn of<const RANK: usize, const STRIDES: usize>(
        mapped: &Mapped<RANK, STRIDES>,
    ) -> Result<Self, TchError> {
        const { assert!(RANK == STRIDES + 1 && RANK <= 5, "a stride for each dimension but the innermost") };
        let driver = Driver::get()?;
        let encode =
            driver.encode_tensor_map.as_ref().map_err(|error| TchError::Torch(format!("CUDA driver: {error}")))?;
        let rank = c_uint::try_from(RANK).map_err(|error| TchError::Torch(error.to_string()))?;
        let mut map = Self([0; 16]);
        // SAFETY: the map has the size and the alignment of a `CUtensorMap`, and the lists as many numbers as the rank asks for; the
        // driver keeps the address as a number.
        let status = unsafe {
            encode(
                &raw mut map,
                MAP_BF16,
                rank,
                std::ptr::with_exposed_provenance_mut(usize::try_from(mapped.address).unwrap_or_default()),
                mapped.sizes.as_ptr(),
                mapped.strides.as_ptr(),
                mapped.boxes.as_ptr(),
                [1; RANK].as_ptr(),
                MAP_NO_INTERLEAVE,
                MAP_SWIZZLE_128,
                MAP_PROMOTION_256,
                MAP_ZEROS_OUTSIDE,
            )
        };
        driver.check(status, "describe a tensor")?;
        Ok(map)
    }
}

/// One argument of a kernel.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Argument<'a> {
    /// Address in device memory; 0 is null.
    Address(u64),
    Int(i32),
    Wide(u64),
    Map(&'a TensorMap),
}

impl Function {
    /// Lets blocks of the kernel have as much dynamic shared memory; more than 48 KiB are not given without it.
    ///
    /// # Errors
    /// The device has less.
    pub(crate) fn allow_shared_bytes(self, bytes: u32) -> Result<(), TchError> {
        let driver = Driver::get()?;
        let bytes = c_int::try_from(bytes).map_err(|error| TchError::Torch(error.to_string()))?;
        // SAFETY: the function is of a module that is never unloaded.
        let status = unsafe { (driver.set_function_attribute)(self.0, MOST_DYNAMIC_SHARED_BYTES, bytes) };
        driver.check(status, "give a kernel shared memory")
    }

    /// Puts the kernel into `stream`.
    ///
    /// # Safety
    /// The arguments are those that the kernel declares, in number and kind; the memory behind the addresses is as large as the
    /// kernel uses, lives until the stream has passed the kernel, and is written by nobody else meanwhile. Kernel and stream are of
    /// one context.
    pub(crate) unsafe fn launch(
        self,
        Shape { blocks: (columns, lines), threads, shared_bytes }: Shape,
        arguments: &[Argument<'_>],
        stream: Stream,
    ) -> Result<(), TchError> {
        let driver = Driver::get()?;
        stream.enter(driver)?;
        let mut places: Vec<*mut c_void> = arguments
            .iter()
            .map(|argument| match argument {
                Argument::Address(value) | Argument::Wide(value) => std::ptr::from_ref(value).cast_mut().cast(),
                Argument::Int(value) => std::ptr::from_ref(value).cast_mut().cast(),
                Argument::Map(map) => std::ptr::from_ref::<TensorMap>(map).cast_mut().cast(),
            })
            .collect();
        // SAFETY: the driver copies the arguments before it returns; the rest is the caller's promise.
        let status = unsafe {
            (driver.launch)(
                self.0,
                columns,
                lines,
                1,
                threads,
                1,
                1,
                shared_bytes,
                stream.stream,
                places.as_mut_ptr(),
                null_mut(),
            )
        };
        driver.check(status, "launch a kernel")
    }
}

/// A mark in a stream.
#[derive(Debug)]
pub(crate) struct Event(*mut c_void);

// SAFETY: an event is a handle that the driver lets any thread use.
unsafe impl Send for Event {}

impl Event {
    /// Marks what `stream` holds so far.
    pub(crate) fn record(stream: Stream) -> Result<Self, TchError> {
        let driver = Driver::get()?;
        stream.enter(driver)?;
        let mut event = null_mut();
        // SAFETY: the pointer is valid for the write.
        driver.check(unsafe { (driver.event_create)(&raw mut event, EVENT_WITHOUT_TIMING) }, "create an event")?;
        let event = Self(event);
        // SAFETY: the event was just created in the stream's context.
        driver.check(unsafe { (driver.event_record)(event.0, stream.stream) }, "record an event")?;
        Ok(event)
    }

    /// Whether the stream has passed it, or failed.
    pub(crate) fn is_passed(&self) -> bool {
        // SAFETY: the event lives as long as `self`.
        Driver::get().is_ok_and(|driver| unsafe { (driver.event_query)(self.0) } != NOT_READY)
    }

    /// Waits until the stream has passed it.
    ///
    /// # Errors
    /// What went wrong on the device since it was last asked.
    pub(crate) fn wait(&self) -> Result<(), TchError> {
        let driver = Driver::get()?;
        // SAFETY: the event lives as long as `self`.
        driver.check(unsafe { (driver.event_synchronize)(self.0) }, "wait for the batch")
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        if let Ok(driver) = Driver::get() {
            // SAFETY: nobody else has the handle; the driver keeps what a stream still needs of it.
            let status = unsafe { (driver.event_destroy)(self.0) };
            tracing::trace!(status, "Event destroyed.");
        }
    }
}

/// The run-time compiler, as `nvrtc.h` declares it.
pub(crate) struct Compiler {
    create: unsafe extern "C" fn(
        *mut *mut c_void,
        *const c_char,
        *const c_char,
        c_int,
        *const *const c_char,
        *const *const c_char,
    ) -> Status,
    compile: unsafe extern "C" fn(*mut c_void, c_int, *const *const c_char) -> Status,
    log_size: unsafe extern "C" fn(*mut c_void, *mut usize) -> Status,
    log: unsafe extern "C" fn(*mut c_void, *mut c_char) -> Status,
    image_size: unsafe extern "C" fn(*mut c_void, *mut usize) -> Status,
    image: unsafe extern "C" fn(*mut c_void, *mut c_char) -> Status,
    destroy: unsafe extern "C" fn(*mut *mut c_void) -> Status,
}

impl Compiler {
    /// Loads a library that the compiler will look for by name; without it the compiler says what it misses.
    pub(crate) fn preload(library: &Path) {
        if let Err(reason) = Library::open(library) {
            tracing::debug!(reason, "Part of the run-time compiler is not where torch's wheels have it.");
        }
    }

    /// # Errors
    /// Why the library cannot be used.
    pub(crate) fn load(library: &Path) -> Result<Self, String> {
        let library = Library::open(library)?;
        // SAFETY: the types are those of `nvrtc.h`; a program is an opaque pointer.
        unsafe {
            Ok(Self {
                create: library.function(c"nvrtcCreateProgram")?,
                compile: library.function(c"nvrtcCompileProgram")?,
                log_size: library.function(c"nvrtcGetProgramLogSize")?,
                log: library.function(c"nvrtcGetProgramLog")?,
                image_size: library.function(c"nvrtcGetCUBINSize")?,
                image: library.function(c"nvrtcGetCUBIN")?,
                destroy: library.function(c"nvrtcDestroyProgram")?,
            })
        }
    }

    /// Machine code of `source`, whose name is in the compiler's messages.
    ///
    /// # Errors
    /// The compiler's own text.
    pub(crate) fn compile(&self, name: &CStr, source: &CStr, options: &[CString]) -> Result<Vec<u8>, String> {
        let mut program = null_mut();
        // SAFETY: the strings outlive the call; there are no headers.
        let status = unsafe { (self.create)(&raw mut program, source.as_ptr(), name.as_ptr(), 0, null(), null()) };
        if status != 0 {
            return Err(format!("the compiler refuses the program with code {status}"));
        }
        let options: Vec<*const c_char> = options.iter().map(|option| option.as_ptr()).collect();
        let count = c_int::try_from(options.len()).map_err(|error| error.to_string())?;
        // SAFETY: the program is alive, and `options` holds `count` C strings that outlive the call.
        let compiled = unsafe { (self.compile)(program, count, options.as_ptr()) };
        let result = if compiled == 0 {
            // SAFETY: of a program that was compiled, both functions give size and bytes of the image.
            unsafe { sized(program, self.image_size, self.image) }.map_err(|code| format!("no image: code {code}"))
        } else {
            // SAFETY: as above, for the log.
            let log = unsafe { sized(program, self.log_size, self.log) }.unwrap_or_default();
            Err(format!("code {compiled}: {}", String::from_utf8_lossy(&log).trim_end_matches(['\0', '\n'])))
        };
        // SAFETY: the program was created above and is not used again.
        unsafe { (self.destroy)(&raw mut program) };
        result
    }
}

/// Bytes of which one function tells the number and another writes them.
///
/// # Safety
/// `program` is alive, and `write` writes as many bytes as `size` says.
unsafe fn sized(
    program: *mut c_void,
    size: unsafe extern "C" fn(*mut c_void, *mut usize) -> Status,
    write: unsafe extern "C" fn(*mut c_void, *mut c_char) -> Status,
) -> Result<Vec<u8>, Status> {
    let mut bytes = 0;
    // SAFETY: the pointer is valid for the write; the rest is the caller's promise.
    let status = unsafe { size(program, &raw mut bytes) };
    if status != 0 {
        return Err(status);
    }
    let mut buffer = vec![0_u8; bytes];
    // SAFETY: the buffer has the size that the library asked for.
    let status = unsafe { write(program, buffer.as_mut_ptr().cast()) };
    if status == 0 { Ok(buffer) } else { Err(status) }
}

unsafe extern "C" {
    fn grail_operator_schema(
        name: *const c_char,
        schema: *mut c_char,
        schema_size: usize,
        error: *mut c_char,
        error_size: usize,
    ) -> c_int;
    fn grail_flash_attention(
        query: *const c_void,
        key: *const c_void,
        value: *const c_void,
        query_offsets: *const c_void,
        key_offsets: *const c_void,
        most_queries: i64,
        most_keys: i64,
        scale: f64,
        error: *mut c_char,
        error_size: usize,
    ) -> *mut c_void;
    fn grail_efficient_attention(
        query: *const c_void,
        key: *const c_void,
        value: *const c_void,
        query_offsets: *const c_void,
        key_offsets: *const c_void,
        most_queries: i64,
        most_keys: i64,
        scale: f64,
        error: *mut c_char,
        error_size: usize,
    ) -> *mut c_void;
    fn grail_upload(
        values: *const i32,
        count: i64,
        device: c_int,
        error: *mut c_char,
        error_size: usize,
    ) -> *mut c_void;
    fn grail_pinned(bytes: i64, error: *mut c_char, error_size: usize) -> *mut c_void;
    fn grail_current_stream(device: c_int, stream: *mut *mut c_void, error: *mut c_char, error_size: usize) -> c_int;
    fn grail_enter_loading_stream(device: c_int, before: *mut i64, error: *mut c_char, error_size: usize) -> c_int;
    fn grail_leave_loading_stream(device: c_int, before: i64, error: *mut c_char, error_size: usize) -> c_int;
    fn grail_default_matrix_products(error: *mut c_char, error_size: usize) -> c_int;
}

/// Calls a function of the shim, which leaves a text in the buffer when it gives nothing.
fn with_error<T>(call: impl FnOnce(&mut [c_char; TEXT_BYTES]) -> Option<T>) -> Result<T, TchError> {
    let mut error = [0; TEXT_BYTES];
    call(&mut error).ok_or_else(|| TchError::Torch(text(&error)))
}

fn text(buffer: &[c_char; TEXT_BYTES]) -> String {
    let bytes: Vec<u8> = buffer.iter().take_while(|byte| **byte != 0).map(|byte| byte.cast_unsigned()).collect();
    String::from_utf8_lossy(&bytes).into_owned()
}

/// Schema of an operator as libtorch has it, and whether a CUDA kernel is registered.
///
/// # Errors
/// libtorch's text if it has no such operator.
pub(crate) fn operator_schema(name: &CStr) -> Result<(String, bool), TchError> {
    let mut schema = [0; TEXT_BYTES];
    let answer = with_error(|error| {
        // SAFETY: the name is a C string, both buffers are valid for writes of their sizes.
        let answer = unsafe {
            grail_operator_schema(name.as_ptr(), schema.as_mut_ptr(), TEXT_BYTES, error.as_mut_ptr(), TEXT_BYTES)
        };
        (answer >= 0).then_some(answer)
    })?;
    Ok((text(&schema), answer == 1))
}

/// Which kernel attends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum VarlenKernel {
    Flash,
    /// Slower, and by other hands: what the first is compared with.
    #[cfg_attr(not(test), expect(dead_code, reason = "it is the oracle of tests"))]
    Efficient,
}

/// Causal attention of sequences end to end.
///
/// * `tensors`: queries, keys, values and the i32 offsets of queries and of keys, as the kernel wants them; the offsets' last
///   values are the numbers of rows (the kernels do not check that).
///
/// # Errors
/// libtorch's text.
pub(crate) fn varlen_attention(
    kernel: VarlenKernel,
    [query, key, value, query_offsets, key_offsets]: [&Tensor; 5],
    (most_queries, most_keys): (i64, i64),
    scale: f64,
) -> Result<Tensor, TchError> {
    let call = match kernel {
        VarlenKernel::Flash => grail_flash_attention,
        VarlenKernel::Efficient => grail_efficient_attention,
    };
    with_error(|error| {
        // SAFETY: the pointers are of live tensors, which the shim only reads; the buffer is valid for writes of its size.
        let result = unsafe {
            call(
                query.as_ptr().cast(),
                key.as_ptr().cast(),
                value.as_ptr().cast(),
                query_offsets.as_ptr().cast(),
                key_offsets.as_ptr().cast(),
                most_queries,
                most_keys,
                scale,
                error.as_mut_ptr(),
                TEXT_BYTES,
            )
        };
        // SAFETY: a pointer that is not null is of a tensor that the shim made for us.
        (!result.is_null()).then(|| unsafe { Tensor::from_ptr(result.cast()) })
    })
}

/// `values` on the n-th visible GPU, i32, copied without waiting for what the GPU does meanwhile.
///
/// # Errors
/// libtorch's text.
pub(crate) fn upload(values: &[i32], device: usize) -> Result<Tensor, TchError> {
    let device = c_int::try_from(device).map_err(|error| TchError::Torch(error.to_string()))?;
    with_error(|error| {
        // SAFETY: the shim copies `values.len()` numbers before it returns; the buffer is valid for writes of its size.
        let result =
            unsafe { grail_upload(values.as_ptr(), values.len() as i64, device, error.as_mut_ptr(), TEXT_BYTES) };
        // SAFETY: a pointer that is not null is of a tensor that the shim made for us.
        (!result.is_null()).then(|| unsafe { Tensor::from_ptr(result.cast()) })
    })
}

/// `bytes` of page-locked memory of the host, u8, not initialised; a GPU reads from it at the full speed of the bus.
///
/// # Errors
/// libtorch's text, for instance without a GPU.
pub(crate) fn pinned(bytes: usize) -> Result<Tensor, TchError> {
    with_error(|error| {
        // SAFETY: the buffer is valid for writes of its size.
        let result = unsafe { grail_pinned(bytes as i64, error.as_mut_ptr(), TEXT_BYTES) };
        // SAFETY: a pointer that is not null is of a tensor that the shim made for us.
        (!result.is_null()).then(|| unsafe { Tensor::from_ptr(result.cast()) })
    })
}

/// A thread whose orders to a GPU go to the stream for loading.
#[derive(Debug)]
pub(crate) struct OnLoadingStream {
    device: c_int,
    before: i64,
}

impl OnLoadingStream {
    /// # Errors
    /// libtorch's text.
    pub(crate) fn enter(device: usize) -> Result<Self, TchError> {
        let device = c_int::try_from(device).map_err(|error| TchError::Torch(error.to_string()))?;
        let mut before = 0;
        with_error(|error| {
            // SAFETY: both pointers are valid for writes of their sizes during the call.
            let status = unsafe { grail_enter_loading_stream(device, &raw mut before, error.as_mut_ptr(), TEXT_BYTES) };
            (status == 0).then_some(Self { device, before })
        })
    }
}

impl Drop for OnLoadingStream {
    fn drop(&mut self) {
        let left = with_error(|error| {
            // SAFETY: the buffer is valid for writes of its size; the number is of a stream of that device.
            let status =
                unsafe { grail_leave_loading_stream(self.device, self.before, error.as_mut_ptr(), TEXT_BYTES) };
            (status == 0).then_some(())
        });
        if let Err(error) = left {
            // Whoever uses the device next meets the same error.
            tracing::debug!(%error, "The stream for loading ended with an error.");
        }
    }
}

/// Sets matrix products in bfloat16 to what Python's torch has by default.
///
/// # Errors
/// libtorch's text.
pub(crate) fn set_default_matrix_products() -> Result<(), TchError> {
    with_error(|error| {
        // SAFETY: the buffer is valid for writes of its size.
        let status = unsafe { grail_default_matrix_products(error.as_mut_ptr(), TEXT_BYTES) };
        (status == 0).then_some(())
    })
}
