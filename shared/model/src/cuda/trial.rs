//! How a kernel for Hopper is loaded, and held against libtorch's operations before it is used: on a card, with a compiler or in a
//! libtorch that it was not measured with it must not compute something else.

use std::ffi::CStr;
use std::path::Path;

use tch::{Device, Kind, TchError, Tensor};

use super::compile::{self, Source};
use super::ffi::{Context, Function};

/// The compute capability whose instructions these kernels are made of. Later cards lack them.
pub(super) const CAPABILITY: (i32, i32) = (9, 0);

/// Norm of all differences over the norm of the results, at most. Measured on an H100 for attention: 0.0025, which is that both round to
/// bf16.
const MOST_APART_OF_ALL: f64 = 5e-3;

/// A kernel with as much dynamic shared memory, from the cache or compiled.
///
/// # Errors
/// Why there is none.
pub(super) fn load(
    context: &Context,
    libraries: &Path,
    (source, macros): (Source, &[String]),
    name: &CStr,
    shared_bytes: u32,
) -> Result<Function, String> {
    let image = compile::image(libraries, CAPABILITY, source, macros)?;
    let loaded = context.load(&image).and_then(|module| {
        let function = module.function(name)?;
        function.allow_shared_bytes(shared_bytes).map(|()| function)
    });
    loaded.map_err(|error| crate::error::TorchError::from(error).detail)
}

/// bf16 between −1.7 and 1.7 on the CPU, with variance one, the same each time: the random numbers of whoever runs this stay as they are.
pub(super) fn scattered(shape: &[i64]) -> Result<Tensor, TchError> {
    let numbers = Tensor::f_arange(shape.iter().product::<i64>(), (Kind::Double, Device::Cpu))?;
    let fractions = numbers.f_mul_scalar(12.9898)?.f_sin()?.f_mul_scalar(43_758.545_3)?.f_frac()?;
    fractions.f_mul_scalar(3.0_f64.sqrt())?.f_to_kind(Kind::BFloat16)?.f_view(shape)
}

/// How far results are from others.
#[derive(Debug, Clone, Copy)]
pub(super) struct Apart {
    largest: f64,
    /// Norm of all differences over the norm of the others.
    of_all: f64,
}

impl Apart {
    pub(super) fn of(ours: &Tensor, theirs: &Tensor) -> Result<Self, TchError> {
        let wide = |x: &Tensor| x.f_to_device(Device::Cpu)?.f_to_kind(Kind::Double);
        let theirs = wide(theirs)?;
        let difference = wide(ours)?.f_sub(&theirs)?;
        let number = |x: Tensor| x.f_double_value(&[]);
        Ok(Self {
            largest: number(difference.f_abs()?.f_max()?)?,
            of_all: number(difference.f_norm()?)? / number(theirs.f_norm()?)?,
        })
    }

    /// Whether no more than rounding is between them, which moves a result by at most `most`; not so if any is no number.
    fn is_rounding(self, most: f64) -> bool {
        self.largest <= most && self.of_all <= MOST_APART_OF_ALL
    }

    /// The kernel whose results these are, if no more than rounding is between them.
    ///
    /// # Errors
    /// How far they are from libtorch's.
    pub(super) fn accept<K>(self, kernel: K, most: f64) -> Result<Option<K>, String> {
        if self.is_rounding(most) { Ok(Some(kernel)) } else { Err(format!("it is not what libtorch's is: {self:?}")) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_rounding_passes_the_check() {
        let theirs = scattered(&[40, 128]).unwrap();
        let variance = theirs.to_kind(Kind::Double).square().mean(Kind::Double).double_value(&[]);
        assert!((variance - 1.0).abs() < 0.05, "{variance}");
        let apart = |ours: &Tensor| Apart::of(ours, &theirs).unwrap();
        assert!(apart(&theirs).is_rounding(0.0));
        assert!(apart(&(&theirs * 1.001)).is_rounding(2e-2));
        assert!(!apart(&(&theirs * 1.004)).is_rounding(1e-4));
        assert!(!apart(&(&theirs * 1.02)).is_rounding(2e-2));
        assert!(!apart(&theirs.roll([1], [0])).is_rounding(2e-2));
        let unwritten = theirs.copy();
        drop(unwritten.get(39).fill_(f64::NAN));
        assert!(!apart(&unwritten).is_rounding(1.0), "{:?}", apart(&unwritten));
    }
}
