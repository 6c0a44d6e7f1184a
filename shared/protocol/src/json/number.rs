//! Numbers as Python prints them.

use std::fmt::Write as _;

const DIGIT_PAIRS: &[u8; 200] = b"0001020304050607080910111213141516171819\
2021222324252627282930313233343536373839\
4041424344454647484950515253545556575859\
6061626364656667686970717273747576777879\
8081828384858687888990919293949596979899";

/// Both digits of a number below 100.
#[expect(clippy::cast_possible_truncation, reason = "below 100")]
fn digit_pair(number: u64) -> &'static [u8; 2] {
    &DIGIT_PAIRS.as_chunks().0[number as usize]
}

/// Appends `number` in decimal. Commitments and token lists are hashed as text, so this is on the hot path of signing.
pub fn push_decimal(out: &mut String, mut number: u64) {
    let mut buffer = [0_u8; 20];
    let mut start = buffer.len();
    while number >= 100 {
        start -= 2;
        buffer[start..start + 2].copy_from_slice(digit_pair(number % 100));
        number /= 100;
    }
    let [tens, ones] = *digit_pair(number);
    start -= 1;
    buffer[start] = ones;
    if number >= 10 {
        start -= 1;
        buffer[start] = tens;
    }
    out.push_str(std::str::from_utf8(&buffer[start..]).expect("decimal digits are ASCII"));
}

/// Appends a signed number in decimal.
pub fn push_signed(out: &mut String, number: i64) {
    if number < 0 {
        out.push('-');
    }
    push_decimal(out, number.unsigned_abs());
}

/// Appends `float.__repr__`: the shortest decimal that reads back as the same binary64, in fixed notation for decimal
/// exponents `-4..16`, else in scientific notation with a signed exponent of at least two digits; non-finite values as
/// JavaScript names them, as `json.dumps` does.
pub fn push_float(out: &mut String, number: f64) {
    if number.is_nan() {
        return out.push_str("NaN");
    }
    if number.is_infinite() {
        return out.push_str(if number > 0.0 { "Infinity" } else { "-Infinity" });
    }
    let mut scientific = StackText::default();
    write!(scientific, "{number:e}").expect("17 digits, sign, point and exponent fit the buffer");
    let (mantissa, exponent) = scientific.as_str().split_once('e').expect("`{:e}` always prints an exponent");
    let exponent: i32 = exponent.parse().expect("`{:e}` prints a decimal exponent");
    let unsigned = mantissa.strip_prefix('-').unwrap_or(mantissa);
    if unsigned.len() < mantissa.len() {
        out.push('-');
    }
    let (whole, fraction) = unsigned.split_once('.').unwrap_or((unsigned, ""));
    match exponent {
        -4..=-1 => {
            out.push_str("0.");
            out.extend(std::iter::repeat_n('0', exponent.unsigned_abs() as usize - 1));
            out.push_str(whole);
            out.push_str(fraction);
        }
        0..=15 => push_fixed(out, whole, fraction, exponent.unsigned_abs() as usize),
        _ => {
            out.push_str(unsigned);
            out.push('e');
            out.push(if exponent < 0 { '-' } else { '+' });
            if exponent.unsigned_abs() < 10 {
                out.push('0');
            }
            push_decimal(out, exponent.unsigned_abs().into());
        }
    }
}

/// Moves the point of `whole.fraction` by `exponent` places to the right; an integral value keeps `.0`.
fn push_fixed(out: &mut String, whole: &str, fraction: &str, exponent: usize) {
    out.push_str(whole);
    if fraction.len() > exponent {
        let (before, after) = fraction.split_at(exponent);
        out.push_str(before);
        out.push('.');
        out.push_str(after);
    } else {
        out.push_str(fraction);
        out.extend(std::iter::repeat_n('0', exponent - fraction.len()));
        out.push_str(".0");
    }
}

/// Text on the stack, so that printing millions of logprobs allocates nothing.
#[derive(Default)]
struct StackText {
    bytes: [u8; 32],
    len: usize,
}

impl StackText {
    fn as_str(&self) -> &str {
        std::str::from_utf8(&self.bytes[..self.len]).expect("only whole strings were written")
    }
}

impl std::fmt::Write for StackText {
    fn write_str(&mut self, text: &str) -> std::fmt::Result {
        let end = self.len + text.len();
        self.bytes.get_mut(self.len..end).ok_or(std::fmt::Error)?.copy_from_slice(text.as_bytes());
        self.len = end;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decimals_equal_the_standard_ones() {
        let mut numbers: Vec<u64> = (0..12_000).collect();
        numbers.extend((0..64).flat_map(|bit| [(1_u64 << bit) - 1, 1 << bit]));
        numbers.push(u64::MAX);
        for number in numbers {
            let mut text = String::new();
            push_decimal(&mut text, number);
            assert_eq!(text, number.to_string());
        }
        for number in [i64::MIN, -1, 0, i64::MAX] {
            let mut text = String::new();
            push_signed(&mut text, number);
            assert_eq!(text, number.to_string());
        }
    }
}
