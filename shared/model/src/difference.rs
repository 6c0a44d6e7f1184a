//! What differs between two sets of files, as a file that [`crate::Changes::open`] reads.

use std::path::Path;

use crate::error::LoadError;
use crate::safetensors::{FileDtype, OwnedTensor, TensorView, write};
use crate::weights::WeightFiles;

/// Positions in files of changes.
pub const INDEX_DTYPE: FileDtype = FileDtype::Other { name: "U32", element_bytes: 4 };

/// Writes what leads from `old` to `new`: positions and new elements of each tensor that differs, or all of it if more than a third
/// of its elements do.
///
/// Returns how many elements differ.
///
/// # Errors
/// [`LoadError::MissingTensor`] and [`LoadError::WrongShape`] if the two are not of one model; [`LoadError::Safetensors`].
pub fn write_difference(old: &WeightFiles, new: &WeightFiles, path: &Path) -> Result<u64, LoadError> {
    let (mut index, mut values, mut wholes) = (Vec::new(), Vec::new(), Vec::new());
    let mut changed = 0_u64;
    for (name, to) in new.iter() {
        let (file, from) = old.find(name)?;
        if from.shape != to.shape || from.dtype != to.dtype {
            return Err(LoadError::WrongShape {
                tensor: name.to_owned(),
                file: file.to_owned(),
                found: from.shape.to_vec(),
                expected: to.shape.to_vec(),
            });
        }
        let Difference { positions, elements } = difference(&from, &to);
        let count = elements.len() / to.dtype.element_bytes();
        changed += count as u64;
        if count * 3 > to.bytes.len() / to.dtype.element_bytes() {
            let (shape, bytes) = (to.shape.to_vec(), to.bytes.to_vec());
            wholes.push(OwnedTensor { name: format!("whole/{name}"), dtype: to.dtype, shape, bytes });
        } else if count > 0 {
            let shape = vec![count];
            let name_of = |part: &str| format!("{part}/{name}");
            index.push(OwnedTensor {
                name: name_of("index"),
                dtype: INDEX_DTYPE,
                shape: shape.clone(),
                bytes: positions,
            });
            values.push(OwnedTensor { name: name_of("value"), dtype: to.dtype, shape, bytes: elements });
        }
    }
    let tensors: Vec<OwnedTensor> = index.into_iter().chain(values).chain(wholes).collect();
    write(path, &tensors)?;
    Ok(changed)
}

/// Positions as `u32` and new elements, little-endian.
struct Difference {
    positions: Vec<u8>,
    elements: Vec<u8>,
}

/// Elements that are compared at once before one by one: most stay as they are.
const BLOCK: usize = 16;

fn difference(from: &TensorView<'_>, to: &TensorView<'_>) -> Difference {
    let width = to.dtype.element_bytes();
    let mut found = Difference { positions: Vec::new(), elements: Vec::new() };
    let blocks = from.bytes.chunks(BLOCK * width).zip(to.bytes.chunks(BLOCK * width));
    for (first, (before, after)) in (0_u32..).step_by(BLOCK).zip(blocks).filter(|(_, (before, after))| before != after)
    {
        for (position, (before, after)) in (first..).zip(before.chunks_exact(width).zip(after.chunks_exact(width))) {
            if before != after {
                found.positions.extend_from_slice(&position.to_le_bytes());
                found.elements.extend_from_slice(after);
            }
        }
    }
    found
}
