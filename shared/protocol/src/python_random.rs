//! `random.Random` of CPython 3.12: Mersenne Twister with version-2 seeding and the algorithms on top of it, call by call.
//!
//! Challenge positions, the sample of groups and the order of tasks are defined by these calls, including how many
//! 32-bit words each of them consumes.

mod mersenne;

use std::collections::HashSet;
use std::f64::consts::TAU;
use std::num::NonZeroU64;

use num_bigint::{BigInt, BigUint};
use sha2::{Digest as _, Sha512};

use mersenne::MersenneTwister;

/// One generator. Two generators with the same seed give the same results for the same calls in the same order.
#[derive(Clone, Debug)]
pub struct PythonRandom {
    twister: MersenneTwister,
    /// The second value of the last pair that [`Self::gauss`] made.
    next_gauss: Option<f64>,
}

impl PythonRandom {
    /// `Random(seed)` for an integer of any size; the sign is ignored, as CPython does.
    #[must_use]
    pub fn from_int(seed: &BigInt) -> Self {
        Self::from_magnitude(seed.magnitude())
    }

    /// `Random(seed)` for an unsigned 64-bit integer.
    #[must_use]
    pub fn from_u64(seed: u64) -> Self {
        Self::from_magnitude(&BigUint::from(seed))
    }

    /// `Random(seed)` for bytes: the integer is `seed ‖ SHA-512(seed)`, big-endian.
    #[must_use]
    pub fn from_bytes(seed: &[u8]) -> Self {
        Self::from_magnitude(&Self::integer_of_bytes(seed))
    }

    /// `Random(seed)` for a text: as [`Self::from_bytes`] of its UTF-8.
    #[must_use]
    #[expect(clippy::should_implement_trait, reason = "no parsing takes place and nothing can fail")]
    pub fn from_str(seed: &str) -> Self {
        Self::from_bytes(seed.as_bytes())
    }

    /// The integer that a seed of bytes turns into.
    #[must_use]
    pub fn integer_of_bytes(seed: &[u8]) -> BigUint {
        let mut material = seed.to_vec();
        material.extend_from_slice(&Sha512::digest(seed));
        BigUint::from_bytes_be(&material)
    }

    fn from_magnitude(seed: &BigUint) -> Self {
        let mut words = seed.to_u32_digits();
        if words.is_empty() {
            words.push(0);
        }
        Self { twister: MersenneTwister::from_words(&words), next_gauss: None }
    }

    /// `getrandbits(bits)` for at most 64 bits.
    ///
    /// # Panics
    /// If `bits > 64`; see [`Self::getrandbits_big`].
    pub fn getrandbits(&mut self, bits: u32) -> u64 {
        assert!(bits <= 64, "a u64 holds 64 bits, not {bits}");
        let low = u64::from(self.word_of_bits(bits.min(32)));
        if bits <= 32 { low } else { low | u64::from(self.word_of_bits(bits - 32)) << 32 }
    }

    /// `getrandbits(bits)` for any number of bits.
    pub fn getrandbits_big(&mut self, bits: u32) -> BigUint {
        let words = (0..bits.div_ceil(32)).map(|word| self.word_of_bits((bits - word * 32).min(32))).collect();
        BigUint::new(words)
    }

    /// The upper `bits` (at most 32) of the next word; none is consumed for 0.
    fn word_of_bits(&mut self, bits: u32) -> u32 {
        if bits == 0 { 0 } else { self.twister.next_word() >> (32 - bits) }
    }

    /// `random()`: 53 random bits in `[0, 1)`.
    pub fn random(&mut self) -> f64 {
        let high = f64::from(self.twister.next_word() >> 5);
        let low = f64::from(self.twister.next_word() >> 6);
        (high * 67_108_864.0 + low) * (1.0 / 9_007_199_254_740_992.0)
    }

    /// `_randbelow(bound)`: an integer in `0..bound`, by rejection.
    pub fn randbelow(&mut self, bound: NonZeroU64) -> u64 {
        let bits = 64 - bound.leading_zeros();
        loop {
            let candidate = self.getrandbits(bits);
            if candidate < bound.get() {
                return candidate;
            }
        }
    }

    /// An index into something of `len` elements.
    fn index_below(&mut self, len: usize) -> usize {
        let bound = NonZeroU64::new(len as u64).expect("callers draw only from what has elements left");
        usize::try_from(self.randbelow(bound)).expect("a number below a usize fits one")
    }

    /// `randrange(start, stop, step)`; `None` if the range is empty or `step` is not positive.
    pub fn randrange(&mut self, start: i64, stop: i64, step: i64) -> Option<i64> {
        let width = u64::try_from(i128::from(stop) - i128::from(start)).ok()?;
        let step = u64::try_from(step).ok().and_then(NonZeroU64::new)?;
        let count = NonZeroU64::new(width.div_ceil(step.get()))?;
        let steps = self.randbelow(count);
        i64::try_from(i128::from(start) + i128::from(step.get()) * i128::from(steps)).ok()
    }

    /// `randint(low, high)`, both ends included; `None` if `high < low`.
    pub fn randint(&mut self, low: i64, high: i64) -> Option<i64> {
        let width = u64::try_from(i128::from(high) - i128::from(low) + 1).ok()?;
        let offset = self.randbelow(NonZeroU64::new(width)?);
        i64::try_from(i128::from(low) + i128::from(offset)).ok()
    }

    /// `uniform(low, high)`.
    pub fn uniform(&mut self, low: f64, high: f64) -> f64 {
        low + (high - low) * self.random()
    }

    /// `gauss(mean, deviation)`.
    pub fn gauss(&mut self, mean: f64, deviation: f64) -> f64 {
        let standard = self.next_gauss.take().unwrap_or_else(|| {
            let angle = self.random() * TAU;
            let radius = (-2.0 * (1.0 - self.random()).ln()).sqrt();
            self.next_gauss = Some(angle.sin() * radius);
            angle.cos() * radius
        });
        mean + standard * deviation
    }

    /// `choice(elements)`; `None` if there are none.
    pub fn choice<'a, T>(&mut self, elements: &'a [T]) -> Option<&'a T> {
        if elements.is_empty() { None } else { Some(&elements[self.index_below(elements.len())]) }
    }

    /// `choices(elements, k=count)`, with repetition; `None` if there are no elements but some are wanted.
    pub fn choices<'a, T>(&mut self, elements: &'a [T], count: usize) -> Option<Vec<&'a T>> {
        let len = elements.len() as f64;
        #[expect(clippy::cast_possible_truncation, reason = "the product lies in [0, len) and is floored on purpose")]
        (0..count).map(|_| elements.get((self.random() * len) as usize)).collect()
    }

    /// `shuffle(elements)`.
    pub fn shuffle<T>(&mut self, elements: &mut [T]) {
        for last in (1..elements.len()).rev() {
            let other = self.index_below(last + 1);
            elements.swap(last, other);
        }
    }

    /// `sample(range(population), count)`; also the indices that `sample` of a list takes. `None` if `count > population`.
    ///
    /// CPython draws from a pool while that takes less memory than a set of what was drawn, and both consume the generator
    /// differently.
    pub fn sample_indices(&mut self, population: usize, count: usize) -> Option<Vec<usize>> {
        if count > population {
            return None;
        }
        if population <= Self::set_size_of_sample(count) {
            let mut pool: Vec<usize> = (0..population).collect();
            let drawn = (0..count).map(|done| {
                let place = self.index_below(population - done);
                let chosen = pool[place];
                pool[place] = pool[population - done - 1];
                chosen
            });
            return Some(drawn.collect());
        }
        let mut seen = HashSet::with_capacity(count);
        let mut drawn = Vec::with_capacity(count);
        while drawn.len() < count {
            let candidate = self.index_below(population);
            if seen.insert(candidate) {
                drawn.push(candidate);
            }
        }
        Some(drawn)
    }

    /// `sample(elements, count)`; `None` if there are fewer elements.
    pub fn sample<'a, T>(&mut self, elements: &'a [T], count: usize) -> Option<Vec<&'a T>> {
        let indices = self.sample_indices(elements.len(), count)?;
        Some(indices.into_iter().map(|index| &elements[index]).collect())
    }

    /// Size of the set that CPython compares a population with: `21`, and `4 ** ceil(log(3 * count, 4))` more above 5.
    ///
    /// Python takes the logarithm in floating point, which agrees with this integer form for every count below 4^20: three
    /// times a count is never a power of 4, and the nearest values stay apart by more than the rounding error.
    fn set_size_of_sample(count: usize) -> usize {
        let mut size = 21_usize;
        if count > 5 {
            let mut power = 1_usize;
            while power < count.saturating_mul(3) && power < usize::MAX / 4 {
                power *= 4;
            }
            size = size.saturating_add(power);
        }
        size
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn impossible_draws_are_none() {
        let mut random = PythonRandom::from_u64(1);
        assert_eq!(random.sample_indices(3, 4), None);
        assert_eq!(random.choice::<u8>(&[]), None);
        assert_eq!(random.choices::<u8>(&[], 1), None);
        assert_eq!(random.randrange(5, 5, 1), None);
        assert_eq!(random.randrange(0, 5, 0), None);
        assert_eq!(random.randint(2, 1), None);
        assert_eq!(random.sample_indices(0, 0), Some(Vec::new()));
    }

    #[test]
    fn set_sizes_equal_those_of_cpython() {
        // [21 + (4 ** math.ceil(math.log(k * 3, 4)) if k > 5 else 0) for k in …]
        for (count, size) in [(0, 21), (5, 21), (6, 85), (21, 85), (22, 277), (32, 277), (85, 277), (86, 1045)] {
            assert_eq!(PythonRandom::set_size_of_sample(count), size, "{count}");
        }
    }

    #[test]
    fn extreme_ranges_do_not_overflow() {
        let mut random = PythonRandom::from_u64(7);
        for _ in 0..64 {
            assert!(random.randint(i64::MIN, i64::MAX - 1).is_some());
            assert!(random.randrange(i64::MIN, i64::MAX, i64::MAX).is_some());
        }
    }
}
