//! What the kernels for weights must compute, whoever runs them: a GPU, or a host for want of one.

use tch::{Device, Kind, Tensor};

use super::weights::{Changed, Selection};
use crate::checksum::{Encoding, HostTensor, host_checksums};
use crate::ffi::host_bytes;

/// Something that runs the kernels; arguments are those of [`super::weights::WeightKernels`].
pub(super) trait WeightSubject {
    /// Where its tensors lie.
    fn weights_device(&self) -> Device;
    fn sums(&self, tensors: &[&Tensor]) -> Tensor;
    fn differences(&self, changed: &[Changed<'_>]) -> Tensor;
    fn copy(&self, pairs: &[(Tensor, Tensor)]);
    fn read(&self, selections: &[Selection<'_>]);
    fn write(&self, selections: &[Selection<'_>]);
    fn differ(&self, selections: &[Selection<'_>]) -> Tensor;
}

/// 16-bit elements of which every pattern of bits occurs, also those of NaN.
fn noise(count: i64, device: Device) -> Tensor {
    Tensor::randint(1 << 16, [count], (Kind::Int, Device::Cpu))
        .bitwise_and(0xffff)
        .to_kind(Kind::Int16)
        .to_device(device)
        .view_dtype(Kind::BFloat16)
}

/// The same elements as numbers that can be compared, on the host.
fn bits(x: &Tensor) -> Tensor {
    x.view_dtype(Kind::Int16).to_device(Device::Cpu)
}

/// Σ bits·(2·index + 1), as a file's checksum has it but for what does not depend on the bits.
fn sum_on_host(x: &Tensor) -> i64 {
    let x = x.to_device(Device::Cpu).contiguous();
    let count = x.numel() as u64;
    let tensor = HostTensor { bytes: host_bytes(&x).unwrap(), encoding: Encoding::Same2 };
    host_checksums(&[tensor])[0].wrapping_sub(count.wrapping_mul(count)).cast_signed()
}

/// Every check.
pub(super) fn all(subject: &dyn WeightSubject) {
    tch::manual_seed(5);
    let device = subject.weights_device();
    sums(subject, device);
    copies(subject, device);
    some_elements(subject, device);
    positions_behind_a_tensor(subject, device);
}

/// Parts of `memory` that begin anywhere in it, and are longer than a piece, shorter than a vector, or empty.
fn parts(memory: &Tensor) -> Vec<Tensor> {
    let places = [(0, 400_001), (1, 300_000), (3, 9), (7, 1), (0, 8), (5, 2), (0, 1), (8, 0), (2, 4_096 * 3 + 5)];
    places.map(|(first, count)| memory.narrow(0, first, count)).into()
}

fn sums(subject: &dyn WeightSubject, device: Device) {
    let memory = noise(400_010, device);
    let parts = parts(&memory);
    let found = Vec::<i64>::try_from(subject.sums(&parts.iter().collect::<Vec<_>>())).unwrap();
    assert_eq!(found, parts.iter().map(sum_on_host).collect::<Vec<_>>());
}

fn copies(subject: &dyn WeightSubject, device: Device) {
    let memory = noise(400_010, device);
    // From and to places that are aligned alike, and others.
    for shift in [0, 1] {
        let pairs: Vec<(Tensor, Tensor)> = parts(&memory)
            .into_iter()
            .map(|from| {
                let count = from.size()[0];
                let to = Tensor::zeros([count + 1], (Kind::BFloat16, device)).narrow(0, shift, count);
                (from, to)
            })
            .collect();
        subject.copy(&pairs);
        for (from, to) in &pairs {
            assert_eq!(bits(to), bits(from));
        }
    }
}

fn some_elements(subject: &dyn WeightSubject, device: Device) {
    // The second has more changes than a piece has elements.
    let sizes = [(30_000, 9_001), (450_000, 300_005)];
    let before = sizes.map(|(elements, _)| noise(elements, device));
    let tensors = before.each_ref().map(Tensor::copy);
    let positions = sizes.map(|(elements, count)| {
        let all = Tensor::randperm(elements, (Kind::Int64, device)).narrow(0, 0, count);
        all.sort(0, false).0.to_kind(Kind::Int)
    });
    let wide = positions.each_ref().map(|positions| positions.to_device(Device::Cpu).to_kind(Kind::Int64));
    let values = sizes.map(|(_, count)| noise(count, device));
    let old = values.each_ref().map(|values| Tensor::full_like(values, f64::NAN));
    let of = |values: &'_ [Tensor; 2]| -> Vec<(Tensor, Tensor, Tensor)> {
        let clone = |x: &Tensor| x.shallow_clone();
        (0..2).map(|at| (clone(&tensors[at]), clone(&positions[at]), clone(&values[at]))).collect()
    };
    fn selections(of: &[(Tensor, Tensor, Tensor)]) -> Vec<Selection<'_>> {
        of.iter().map(|(tensor, positions, values)| Selection { tensor, positions, values }).collect()
    }
    let differ = |values: &[Tensor; 2]| subject.differ(&selections(&of(values))).int64_value(&[0]);

    subject.read(&selections(&of(&old)));
    for at in 0..2 {
        assert_eq!(bits(&old[at]), bits(&before[at]).index_select(0, &wide[at]));
    }
    assert_eq!((differ(&old), differ(&values)), (0, 1));

    subject.write(&selections(&of(&values)));
    for at in 0..2 {
        let expected = bits(&before[at]).index_copy(0, &wide[at], &bits(&values[at]));
        assert_eq!(bits(&tensors[at]), expected, "elements that are not named stay");
    }
    assert_eq!(differ(&values), 0);
    // One bit of the last element that was written.
    let last = wide[1].int64_value(&[sizes[1].1 - 1]);
    let mut element = tensors[1].view_dtype(Kind::Int16).narrow(0, last, 1);
    drop(element.bitwise_xor_(1));
    assert_eq!(differ(&values), 1);
    drop(element.bitwise_xor_(1));

    let changed: Vec<Changed<'_>> =
        (0..2).map(|at| Changed { positions: &positions[at], before: &old[at], after: &values[at] }).collect();
    let found = Vec::<i64>::try_from(subject.differences(&changed)).unwrap();
    for at in 0..2 {
        assert_eq!(sum_on_host(&before[at]).wrapping_add(found[at]), sum_on_host(&tensors[at]));
    }
}

/// Neither written nor found right: whatever lies behind a tensor is another one's.
fn positions_behind_a_tensor(subject: &dyn WeightSubject, device: Device) {
    let memory = noise(1_010, device);
    let (before, tensor) = (bits(&memory).copy(), memory.narrow(0, 0, 1_000));
    let positions = Tensor::from_slice(&[3_i32, 1_000, -1]).to_device(device);
    let values = (memory.narrow(0, 3, 1).view_dtype(Kind::Int16) + 1).expand([3], false).contiguous();
    subject.write(&[Selection { tensor: &tensor, positions: &positions, values: &values }]);
    let expected = before.copy();
    drop(expected.narrow(0, 3, 1).g_add_scalar_(1));
    assert_eq!(bits(&memory), expected);
    let outside = Selection { tensor: &tensor, positions: &positions.narrow(0, 1, 1), values: &values.narrow(0, 1, 1) };
    assert_eq!(subject.differ(&[outside]).int64_value(&[0]), 1);
    let read = Tensor::full([3], 7, (Kind::Int16, device));
    subject.read(&[Selection { tensor: &tensor, positions: &positions, values: &read }]);
    assert_eq!(Vec::<i64>::try_from(read.to_kind(Kind::Int64)).unwrap(), [values.int64_value(&[0]), 7, 7]);
}
