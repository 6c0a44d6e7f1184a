//! What the kernels for weights must compute, whoever runs them: a GPU, or a host for want of one.

use tch::{Device, Kind, Tensor};

use super::weights::Selection;
use crate::checksum::{Encoding, HostTensor, host_checksums};
use crate::ffi::host_bytes;

/// Something that runs the kernels; arguments are those of [`super::weights::WeightKernels`].
pub(super) trait WeightSubject {
    /// Where its tensors lie.
    fn weights_device(&self) -> Device;
    fn sum_elements(&self, x: &Tensor, total: &Tensor);
    fn sum_differences(&self, positions: &Tensor, values: [&Tensor; 2], total: &Tensor);
    fn read(&self, selection: Selection<'_>);
    fn write(&self, selection: Selection<'_>);
    fn compare(&self, selection: Selection<'_>, differ: &Tensor);
}

/// 16-bit elements of which every pattern of bits occurs, also those of NaN.
fn noise(count: i64, device: Device) -> Tensor {
    Tensor::randint(1 << 16, [count], (Kind::Int, Device::Cpu))
        .bitwise_and(0xffff)
        .to_kind(Kind::Int16)
        .to_device(device)
        .view_dtype(Kind::BFloat16)
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
    some_elements(subject, device);
}

fn sums(subject: &dyn WeightSubject, device: Device) {
    let memory = noise(70_010, device);
    // Wherever a tensor begins in its neighbours' memory, and whatever is left behind its last vector.
    for (first, count) in [(0, 70_001), (1, 70_000), (3, 9), (7, 1), (0, 8), (5, 2), (0, 1), (2, 4_096 * 3 + 5)] {
        let part = memory.narrow(0, first, count);
        // What is there already counts.
        let total = Tensor::full([1], -5, (Kind::Int64, device));
        subject.sum_elements(&part, &total);
        assert_eq!(total.int64_value(&[0]).wrapping_add(5), sum_on_host(&part), "{count} from {first}");
    }
}

fn some_elements(subject: &dyn WeightSubject, device: Device) {
    let before = noise(30_000, device);
    let positions =
        Tensor::randperm(30_000, (Kind::Int64, device)).narrow(0, 0, 9_001).sort(0, false).0.to_kind(Kind::Int);
    let (values, tensor) = (noise(9_001, device), before.copy());
    let bits = |x: &Tensor| x.view_dtype(Kind::Int16).to_device(Device::Cpu);
    let old = Tensor::full_like(&values, f64::NAN);
    subject.read(Selection { tensor: &tensor, positions: &positions, values: &old });
    assert_eq!(bits(&old), bits(&before).index_select(0, &positions.to_device(Device::Cpu).to_kind(Kind::Int64)));

    let selection = Selection { tensor: &tensor, positions: &positions, values: &values };
    subject.write(selection);
    let wide = positions.to_device(Device::Cpu).to_kind(Kind::Int64);
    let expected = bits(&before).index_copy(0, &wide, &bits(&values));
    assert_eq!(bits(&tensor), expected, "elements that are not named stay");

    let differ = Tensor::zeros([1], (Kind::Int, device));
    subject.compare(selection, &differ);
    assert_eq!(differ.int64_value(&[0]), 0);
    // One bit of the last element that was written.
    let last = positions.int64_value(&[9_000]);
    let mut element = tensor.view_dtype(Kind::Int16).narrow(0, last, 1);
    drop(element.bitwise_xor_(1));
    subject.compare(selection, &differ);
    assert_eq!(differ.int64_value(&[0]), 1);
    drop(element.bitwise_xor_(1));

    let total = Tensor::zeros([1], (Kind::Int64, device));
    subject.sum_differences(&positions, [&old, &values], &total);
    assert_eq!(sum_on_host(&before).wrapping_add(total.int64_value(&[0])), sum_on_host(&tensor));
}
