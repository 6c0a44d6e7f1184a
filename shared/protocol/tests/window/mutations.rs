//! Damaged files: the reader answers, whatever the bytes are.

use std::sync::LazyLock;

use grail_protocol::window_file::{ReadError, read_bytes, write_file};
use proptest::prelude::*;

use crate::samples::{golden_bytes, header, rows};

/// Positions are shares of the file in these parts.
const SCALE: usize = 1 << 20;

/// One kind of damage; positions are shares of the file, because its footer and its pages deserve the same attention.
#[derive(Debug, Clone)]
enum Damage {
    Set { at: usize, byte: u8 },
    SetInFooter { from_end: usize, byte: u8 },
    Cut { at: usize, bytes: usize },
    Repeat { at: usize, bytes: usize },
    Truncate { at: usize },
}

fn damage() -> impl Strategy<Value = Damage> {
    prop_oneof![
        3 => (0..SCALE, any::<u8>()).prop_map(|(at, byte)| Damage::Set { at, byte }),
        4 => (0_usize..4_000, any::<u8>()).prop_map(|(from_end, byte)| Damage::SetInFooter { from_end, byte }),
        1 => (0..SCALE, 1_usize..64).prop_map(|(at, bytes)| Damage::Cut { at, bytes }),
        1 => (0..SCALE, 1_usize..64).prop_map(|(at, bytes)| Damage::Repeat { at, bytes }),
        1 => (0..SCALE).prop_map(|at| Damage::Truncate { at }),
    ]
}

fn apply(file: &mut Vec<u8>, damage: &Damage) {
    if file.is_empty() {
        return;
    }
    let place = |at: usize| file.len() * at / SCALE;
    match *damage {
        Damage::Set { at, byte } => {
            let at = place(at);
            file[at] = byte;
        }
        Damage::SetInFooter { from_end, byte } => {
            let at = (file.len() - 1).saturating_sub(from_end);
            file[at] = byte;
        }
        Damage::Cut { at, bytes } => {
            let at = place(at);
            file.drain(at..(at + bytes).min(file.len()));
        }
        Damage::Repeat { at, bytes } => {
            let at = place(at);
            let again = file[at..(at + bytes).min(file.len())].to_vec();
            file.splice(at..at, again);
        }
        Damage::Truncate { at } => file.truncate(place(at)),
    }
}

fn read_damaged(mut file: Vec<u8>, damages: &[Damage]) -> Result<(), TestCaseError> {
    damages.iter().for_each(|damage| apply(&mut file, damage));
    match read_bytes(file) {
        // Damage may hit bytes that carry no meaning, or leave another value of the same kind.
        Ok(_) => {}
        Err(ReadError::Corrupt { detail, .. } | ReadError::Absent { detail }) => prop_assert!(!detail.is_empty()),
        Err(error) => prop_assert!(false, "{error}"),
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(192))]

    #[test]
    fn damaged_reference_files_are_answered(damages in proptest::collection::vec(damage(), 1..6)) {
        read_damaged(golden_bytes("valid"), &damages)?;
    }

    #[test]
    fn damaged_own_files_are_answered(damages in proptest::collection::vec(damage(), 1..6)) {
        static OWN: LazyLock<Vec<u8>> =
            LazyLock::new(|| write_file(Vec::new(), header(), &rows(0..1, 8, 40)).unwrap());
        read_damaged(OWN.clone(), &damages)?;
    }

    #[test]
    fn noise_is_answered(noise in proptest::collection::vec(any::<u8>(), 0..400), framed in any::<bool>()) {
        let mut file = noise;
        if framed {
            let length = u32::try_from(file.len()).unwrap();
            file.splice(0..0, *b"PAR1");
            file.extend(length.to_le_bytes());
            file.extend(b"PAR1");
        }
        prop_assert!(read_bytes(file).is_err());
    }
}
