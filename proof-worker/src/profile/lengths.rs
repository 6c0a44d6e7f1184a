//! Lengths of synthetic prompts and completions: a distribution by name, drawn from a seed.

use std::fmt;
use std::str::FromStr;

/// A distribution of lengths in tokens.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Lengths {
    Fixed(u32),
    /// Both ends included.
    Uniform {
        least: u32,
        most: u32,
    },
    /// `mean` is the mean of the lengths, `sigma` the deviation of their logarithms.
    LogNormal {
        mean: f64,
        sigma: f64,
    },
}

/// A text that names no distribution of lengths.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{text:?} is no distribution of lengths ({problem}): write fixed:N, uniform:A-B or lognormal:MEAN,SIGMA with lengths of at \
     least 1 token"
)]
pub struct NotLengths {
    pub text: String,
    pub problem: &'static str,
}

impl FromStr for Lengths {
    type Err = NotLengths;
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::parse(text).map_err(|problem| NotLengths { text: text.to_owned(), problem })
    }
}

impl Lengths {
    fn parse(text: &str) -> Result<Self, &'static str> {
        let (kind, numbers) = text.split_once(':').ok_or("it has no colon")?;
        let length = |text: &str| match text.parse::<u32>() {
            Ok(0) => Err("a length is 0"),
            Ok(length) => Ok(length),
            Err(_) => Err("a length is no whole number"),
        };
        match kind {
            "fixed" => Ok(Self::Fixed(length(numbers)?)),
            "uniform" => {
                let (least, most) = numbers.split_once('-').ok_or("uniform takes two lengths with - between them")?;
                let (least, most) = (length(least)?, length(most)?);
                if least > most {
                    return Err("the first length is larger than the second");
                }
                Ok(Self::Uniform { least, most })
            }
            "lognormal" => {
                let (mean, sigma) =
                    numbers.split_once(',').ok_or("lognormal takes a mean and a sigma, with a comma")?;
                let mean: f64 = mean.parse().map_err(|_| "the mean is no number")?;
                let sigma: f64 = sigma.parse().map_err(|_| "the sigma is no number")?;
                if !(1.0..=1e9).contains(&mean) {
                    return Err("the mean is below 1 or absurdly large");
                }
                if !(0.0..=10.0).contains(&sigma) {
                    return Err("the sigma is not between 0 and 10");
                }
                Ok(Self::LogNormal { mean, sigma })
            }
            _ => Err("its kind is unknown"),
        }
    }

    /// One length, from 1 to `most`; a longer one is cut to that.
    pub(crate) fn draw(self, random: &mut Random, most: u32) -> u32 {
        let length = match self {
            Self::Fixed(length) => length,
            Self::Uniform { least, most } => {
                let choices = u64::from(most - least) + 1;
                least.saturating_add(u32::try_from(random.below(choices)).unwrap_or(u32::MAX))
            }
            Self::LogNormal { mean, sigma } => {
                let location = mean.ln() - sigma * sigma / 2.0;
                rounded((location + sigma * random.normal()).exp())
            }
        };
        length.clamp(1, most.max(1))
    }
}

#[expect(clippy::cast_possible_truncation, reason = "the value is inside the type's range")]
fn rounded(length: f64) -> u32 {
    length.round().clamp(0.0, f64::from(u32::MAX)) as u32
}

impl fmt::Display for Lengths {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Fixed(length) => write!(f, "fixed:{length}"),
            Self::Uniform { least, most } => write!(f, "uniform:{least}-{most}"),
            Self::LogNormal { mean, sigma } => write!(f, "lognormal:{mean},{sigma}"),
        }
    }
}

/// Numbers that follow from a seed alone (SplitMix64), so that a profile can be repeated anywhere.
#[derive(Debug, Clone)]
pub(crate) struct Random(u64);

impl Random {
    pub(crate) const fn new(seed: u64) -> Self {
        Self(seed)
    }

    /// 64 random bits.
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// In `0..count`; the bias is below `count / 2^64`.
    pub(crate) fn below(&mut self, count: u64) -> u64 {
        let product = u128::from(self.next()) * u128::from(count);
        u64::try_from(product >> 64).unwrap_or_default()
    }

    /// In `(0, 1]`.
    fn unit(&mut self) -> f64 {
        ((self.next() >> 11) + 1) as f64 / (1_u64 << 53) as f64
    }

    /// Standard normal (Box and Muller).
    fn normal(&mut self) -> f64 {
        let radius = (-2.0 * self.unit().ln()).sqrt();
        radius * (std::f64::consts::TAU * self.unit()).cos()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn drawn(lengths: &str, most: u32) -> Vec<u32> {
        let (lengths, mut random) = (lengths.parse::<Lengths>().unwrap(), Random::new(3));
        (0..20_000).map(|_| lengths.draw(&mut random, most)).collect()
    }

    #[test]
    fn lengths_follow_their_distribution() {
        assert!(drawn("fixed:7", 100).iter().all(|length| *length == 7));
        let uniform = drawn("uniform:3-6", 100);
        assert!(
            (3..=6).all(|length| uniform.contains(&length)) && uniform.iter().all(|length| (3..=6).contains(length))
        );
        let spread = drawn("lognormal:800,0.5", 100_000);
        let mean = spread.iter().map(|length| f64::from(*length)).sum::<f64>() / spread.len() as f64;
        assert!((mean - 800.0).abs() < 20.0, "{mean}");
        let above = spread.iter().filter(|length| f64::from(**length) > 800.0 * (-0.125_f64).exp()).count();
        assert!((9_500..10_500).contains(&above), "half lie above the median: {above}");
    }

    #[test]
    fn lengths_are_cut_at_the_maximum_and_at_one() {
        assert!(drawn("fixed:70", 50).iter().all(|length| *length == 50));
        let spread = drawn("lognormal:2,3", 10);
        assert!(spread.contains(&1) && spread.contains(&10) && spread.iter().all(|length| (1..=10).contains(length)));
    }

    #[test]
    fn what_is_written_is_read() {
        for text in ["fixed:200", "uniform:1-9", "lognormal:800,0.5", "lognormal:1,0"] {
            assert_eq!(text.parse::<Lengths>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn other_texts_are_refused_with_the_remedy() {
        for (text, problem) in [
            ("800", "it has no colon"),
            ("normal:800", "its kind is unknown"),
            ("fixed:0", "a length is 0"),
            ("fixed:many", "a length is no whole number"),
            ("uniform:5", "uniform takes two lengths"),
            ("uniform:9-5", "the first length is larger"),
            ("uniform:0-5", "a length is 0"),
            ("lognormal:800", "lognormal takes a mean and a sigma"),
            ("lognormal:0,1", "the mean is below 1"),
            ("lognormal:x,1", "the mean is no number"),
            ("lognormal:nan,1", "the mean is below 1"),
            ("lognormal:5,-1", "the sigma is not between"),
            ("lognormal:5,x", "the sigma is no number"),
        ] {
            let error = text.parse::<Lengths>().unwrap_err().to_string();
            assert!(error.contains(&format!("{text:?}")) && error.contains(problem), "{error}");
            assert!(error.contains("write fixed:N, uniform:A-B or lognormal:MEAN,SIGMA"), "{error}");
        }
    }

    #[test]
    fn a_seed_gives_the_same_numbers_everywhere() {
        // The published first outputs of SplitMix64 for seed 1234567.
        let mut random = Random::new(1_234_567);
        assert_eq!([random.next(), random.next()], [6_457_827_717_110_365_317, 3_203_168_211_198_807_973]);
        assert!((0..1_000).all(|_| random.below(3) < 3));
    }
}
