//! What injected faults make of messages. Nothing here is reached without `GRAIL_FAULT`.

use bytes::Bytes;
use grail_ipc::codec::{CodecError, encode};
use grail_ipc::framing::HEADER_BYTES;
use grail_ipc::messages::{Epoch, FromWorker, Hello};
use grail_ipc::token::TOKEN_BYTES;
use grail_process::fault::Act;

/// Body of a frame of noise.
const NOISE_BYTES: u32 = 1_024;

/// A hello as a fault leaves it.
#[derive(Debug)]
pub(crate) enum SpoiltHello {
    Message(Hello),
    /// To be written before the connection ends.
    Bytes(Bytes),
}

/// The frame of `hello` as `act` leaves it.
///
/// # Errors
/// [`CodecError`] if it cannot be encoded.
pub(crate) fn spoil_hello(act: Act, mut hello: Hello) -> Result<SpoiltHello, CodecError> {
    match act {
        Act::WrongVersion => hello.protocol = hello.protocol.wrapping_add(1),
        Act::WrongToken if hello.token.is_empty() => hello.token = vec![0; TOKEN_BYTES],
        Act::WrongToken => hello.token.iter_mut().for_each(|byte| *byte = !*byte),
        Act::StaleEpoch => hello.epoch = before(hello.epoch),
        other => return Ok(SpoiltHello::Bytes(SpoiltFrame::of(other, Some(FromWorker::Hello(hello)))?.before)),
    }
    Ok(SpoiltHello::Message(hello))
}

/// What is written instead of a frame.
#[derive(Debug)]
pub(crate) struct SpoiltFrame {
    /// Before the process meets its act, if that is one of the process.
    pub before: Bytes,
    pub after: Bytes,
    pub hangs_up: bool,
}

impl SpoiltFrame {
    /// What `act` leaves of `message`, or of a frame of noise if none was due.
    ///
    /// # Errors
    /// [`CodecError`] if the message cannot be encoded.
    pub(crate) fn of(act: Act, message: Option<FromWorker>) -> Result<Self, CodecError> {
        let nothing = Bytes::new();
        Ok(match act {
            Act::Garbage => Self { before: noise(), after: nothing, hangs_up: false },
            Act::Oversize => {
                Self { before: Bytes::from_static(&[0xff; HEADER_BYTES]), after: nothing, hangs_up: false }
            }
            Act::Truncated => {
                let frame = message.as_ref().map_or_else(|| Ok(noise()), encode)?;
                Self { before: frame.slice(..frame.len() / 2), after: nothing, hangs_up: true }
            }
            act if act.is_of_process() => {
                let mut before = message.as_ref().map_or_else(|| Ok(Bytes::new()), encode)?;
                let after = before.split_off(before.len() / 2);
                Self { before, after, hangs_up: false }
            }
            act => {
                let spoilt = message.map(|message| spoil(act, message));
                let frame = spoilt.as_ref().map_or_else(|| Ok(Bytes::new()), encode)?;
                Self { before: frame, after: nothing, hangs_up: false }
            }
        })
    }
}

fn spoil(act: Act, mut message: FromWorker) -> FromWorker {
    match (act, &mut message) {
        (Act::StaleEpoch, FromWorker::Proved(proved)) => proved.epoch = before(proved.epoch),
        (Act::StaleEpoch, FromWorker::Verified(verified)) => verified.epoch = before(verified.epoch),
        (Act::StaleEpoch, FromWorker::Pong(pong)) => pong.epoch = before(pong.epoch),
        (Act::Nan, FromWorker::Proved(proved)) => fill_with_nan(&mut proved.logprobs),
        (Act::Nan, FromWorker::Verified(verified)) => {
            verified.rows.iter_mut().for_each(|row| fill_with_nan(&mut row.logprobs));
        }
        _ => {}
    }
    message
}

/// The incarnation before this one.
fn before(epoch: Epoch) -> Epoch {
    Epoch(epoch.0.wrapping_sub(1))
}

fn fill_with_nan(logprobs: &mut [u8]) {
    for value in logprobs.as_chunks_mut::<4>().0 {
        *value = f32::NAN.to_le_bytes();
    }
}

/// A whole frame whose body is no message; the same bytes every time, so that what they do can be repeated.
fn noise() -> Bytes {
    let mut state = 0x9e37_79b9_u32;
    let body = std::iter::repeat_with(move || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        state.to_le_bytes()[0]
    });
    let length = NOISE_BYTES.to_le_bytes();
    length.into_iter().chain(body.take(NOISE_BYTES as usize)).collect()
}

#[cfg(test)]
mod tests {
    use grail_ipc::codec::decode;
    use grail_ipc::framing::FrameDecoder;
    use grail_ipc::messages::{Proved, RequestId};
    use grail_protocol::ids::{GroupIndex, WeightsHash};

    use super::*;

    fn proved() -> FromWorker {
        FromWorker::Proved(Proved {
            id: RequestId(3),
            epoch: Epoch(5),
            group: GroupIndex(1),
            weights: WeightsHash(2),
            prompt_sketches: vec![1; 8],
            sketches: vec![2; 8],
            logprobs: vec![3; 8],
            eos_probabilities: vec![0.5],
            compute_us: 9,
        })
    }

    #[test]
    fn a_process_meets_its_act_in_the_middle_of_the_frame() {
        let whole = encode(&proved()).unwrap();
        for act in Act::EXAMPLES.into_iter().filter(|act| act.is_of_process()) {
            let SpoiltFrame { before, after, hangs_up } = SpoiltFrame::of(act, Some(proved())).unwrap();
            assert!(!hangs_up && before.len() == whole.len() / 2, "{act}");
            assert_eq!([before, after].concat(), whole);
        }
        assert!(SpoiltFrame::of(Act::Kill, None).unwrap().before.is_empty(), "nothing was due");
    }

    #[test]
    fn noise_is_a_frame_and_no_message() {
        let mut decoder = FrameDecoder::default();
        decoder.push(&SpoiltFrame::of(Act::Garbage, Some(proved())).unwrap().before);
        let body = decoder.next_frame().unwrap().expect("a whole frame");
        assert_eq!(decoder.pending_bytes(), 0);
        assert!(decode::<FromWorker>(&body).is_err());
        let mut decoder = FrameDecoder::default();
        decoder.push(&SpoiltFrame::of(Act::Oversize, None).unwrap().before);
        assert!(decoder.next_frame().is_err());
    }

    #[test]
    fn contents_are_spoilt_in_place() {
        let spoilt = |act| {
            let frame = SpoiltFrame::of(act, Some(proved())).unwrap().before;
            match decode(&frame[HEADER_BYTES..]).unwrap() {
                FromWorker::Proved(proved) => proved,
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(spoilt(Act::StaleEpoch).epoch, Epoch(4));
        let logprobs = grail_ipc::bulk::f32_from_bytes(&spoilt(Act::Nan).logprobs).unwrap();
        assert!(logprobs.len() == 2 && logprobs.iter().all(|logprob| logprob.is_nan()));
    }
}
