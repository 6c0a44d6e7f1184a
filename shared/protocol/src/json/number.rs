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
    let scientific = shortest(number);
    let (mantissa, exponent) = scientific.parts();
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

/// The shortest decimal that reads back as `number`, in scientific notation. If two are equally near, CPython takes the one with
/// the even last digit, where Rust takes the larger: common among widened binary32, whose decimal expansions are short.
fn shortest(number: f64) -> StackText {
    let text = StackText::of(format_args!("{number:e}"));
    let (mantissa, exponent) = text.parts();
    let digits = mantissa.split_once('.').map_or(0, |(_, fraction)| fraction.len());
    // The last digit of an exact expansion is a 5 at the place of the lowest bit: text that ends one place before is halfway.
    let places = i32::try_from(digits).expect("a mantissa has at most 17 digits") - exponent;
    if lowest_bit(number) != Some(-(places + 1)) {
        return text;
    }
    let even = StackText::of(format_args!("{number:.digits$e}"));
    // Next to a power of two the even one may be that of another number.
    let reads_back = even.as_str().parse::<f64>().is_ok_and(|read| read.to_bits() == number.to_bits());
    if reads_back { even } else { text }
}

/// Exponent of the lowest set bit of a finite number; `None` for 0.
fn lowest_bit(number: f64) -> Option<i32> {
    const FRACTION_BITS: u32 = f64::MANTISSA_DIGITS - 1;
    let bits = number.to_bits();
    let (fraction, exponent) = (bits & ((1 << FRACTION_BITS) - 1), (bits >> FRACTION_BITS) & 0x7FF);
    let (significand, exponent) = if exponent == 0 { (fraction, 1) } else { (fraction | 1 << FRACTION_BITS, exponent) };
    let exponent = i32::try_from(exponent).expect("eleven bits") - 1_075;
    (significand != 0).then(|| exponent + significand.trailing_zeros().cast_signed())
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
    fn of(text: std::fmt::Arguments<'_>) -> Self {
        let mut written = Self::default();
        written.write_fmt(text).expect("17 digits, sign, point and exponent fit the buffer");
        written
    }

    /// Mantissa and exponent of a number in scientific notation.
    fn parts(&self) -> (&str, i32) {
        let (mantissa, exponent) = self.as_str().split_once('e').expect("`{:e}` always prints an exponent");
        (mantissa, exponent.parse().expect("`{:e}` prints a decimal exponent"))
    }

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
    fn of_two_equally_near_decimals_the_even_one_is_printed() {
        for (number, text) in [
            (1_307_825.0 / 65_536.0, "19.955825805664062"),
            (117_809.0 / 131_072.0, "0.8988113403320312"),
            (-168_829.0 / 131_072.0, "-1.2880630493164062"),
            (409_565.0 / 131_072.0, "3.1247329711914062"),
            (524_289.0 / 65_536.0, "8.000015258789062"),
            (0.5, "0.5"),
            (9_007_199_254_740_992.0, "9007199254740992.0"),
            (f64::from_bits(1), "5e-324"),
            (0.0, "0.0"),
        ] {
            let mut printed = String::new();
            push_float(&mut printed, number);
            assert_eq!(printed, text);
        }
    }

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
