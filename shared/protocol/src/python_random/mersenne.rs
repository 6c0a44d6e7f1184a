//! MT19937.

const STATE_WORDS: usize = 624;
const SHIFT_WORDS: usize = 397;
const MATRIX: u32 = 0x9908_B0DF;
const UPPER_BIT: u32 = 0x8000_0000;
const LOWER_BITS: u32 = 0x7FFF_FFFF;

#[derive(Clone)]
pub(super) struct MersenneTwister {
    state: [u32; STATE_WORDS],
    next: usize,
}

impl std::fmt::Debug for MersenneTwister {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MersenneTwister").field("next", &self.next).finish_non_exhaustive()
    }
}

impl MersenneTwister {
    /// `init_by_array`: `words` are the seed's 32-bit words, least significant first, at least one.
    pub(super) fn from_words(words: &[u32]) -> Self {
        let mut state = Self::state_of_word(19_650_218);
        let mut place = 1;
        let mut word = 0;
        for _ in 0..STATE_WORDS.max(words.len()) {
            let mixed = (state[place - 1] ^ state[place - 1] >> 30).wrapping_mul(1_664_525);
            state[place] = (state[place] ^ mixed).wrapping_add(words[word]).wrapping_add(low_word(word));
            place = Self::next_place(&mut state, place);
            word = (word + 1) % words.len();
        }
        for _ in 0..STATE_WORDS - 1 {
            let mixed = (state[place - 1] ^ state[place - 1] >> 30).wrapping_mul(1_566_083_941);
            state[place] = (state[place] ^ mixed).wrapping_sub(low_word(place));
            place = Self::next_place(&mut state, place);
        }
        state[0] = UPPER_BIT;
        Self { state, next: STATE_WORDS }
    }

    fn state_of_word(seed: u32) -> [u32; STATE_WORDS] {
        let mut state = [0; STATE_WORDS];
        state[0] = seed;
        for place in 1..STATE_WORDS {
            let previous = state[place - 1];
            state[place] = (previous ^ previous >> 30).wrapping_mul(1_812_433_253).wrapping_add(low_word(place));
        }
        state
    }

    /// Steps through places `1..624`; at the end the last word becomes the first.
    fn next_place(state: &mut [u32; STATE_WORDS], place: usize) -> usize {
        if place + 1 < STATE_WORDS {
            return place + 1;
        }
        state[0] = state[STATE_WORDS - 1];
        1
    }

    pub(super) fn next_word(&mut self) -> u32 {
        if self.next == STATE_WORDS {
            self.twist();
        }
        let mut word = self.state[self.next];
        self.next += 1;
        word ^= word >> 11;
        word ^= word << 7 & 0x9D2C_5680;
        word ^= word << 15 & 0xEFC6_0000;
        word ^ word >> 18
    }

    fn twist(&mut self) {
        for place in 0..STATE_WORDS {
            let joined = self.state[place] & UPPER_BIT | self.state[(place + 1) % STATE_WORDS] & LOWER_BITS;
            let twisted = joined >> 1 ^ if joined & 1 == 1 { MATRIX } else { 0 };
            self.state[place] = self.state[(place + SHIFT_WORDS) % STATE_WORDS] ^ twisted;
        }
        self.next = 0;
    }
}

/// Index arithmetic of the seeding is modulo 2^32.
#[expect(clippy::cast_possible_truncation, reason = "modulo 2^32 on purpose")]
const fn low_word(index: usize) -> u32 {
    index as u32
}
