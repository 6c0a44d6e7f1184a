//! Sums of floats as CPython 3.12 computes them.

/// The built-in `sum` of floats: compensated as by Neumaier since CPython 3.12, so it differs from adding one after the other.
#[must_use]
pub fn python_sum(numbers: impl IntoIterator<Item = f64>) -> f64 {
    let mut sum = 0.0_f64;
    let mut compensation = 0.0_f64;
    for number in numbers {
        let next = sum + number;
        compensation += if sum.abs() >= number.abs() { (sum - next) + number } else { (number - next) + sum };
        sum = next;
    }
    if compensation != 0.0 && compensation.is_finite() { sum + compensation } else { sum }
}

/// `math.fsum` of finite floats whose sum does not overflow: exact, rounded once.
#[must_use]
pub fn python_fsum(numbers: impl IntoIterator<Item = f64>) -> f64 {
    // Partial sums of growing magnitude that do not overlap; their sum is exact at every step.
    let mut partials: Vec<f64> = Vec::new();
    for mut number in numbers {
        let mut kept = 0;
        for index in 0..partials.len() {
            let partial = partials[index];
            let (larger, smaller) = if number.abs() < partial.abs() { (partial, number) } else { (number, partial) };
            let high = larger + smaller;
            let low = smaller - (high - larger);
            if low != 0.0 {
                partials[kept] = low;
                kept += 1;
            }
            number = high;
        }
        partials.truncate(kept);
        partials.push(number);
    }
    let Some(mut high) = partials.pop() else { return 0.0 };
    let mut low = 0.0;
    while let Some(partial) = partials.pop() {
        let before = high;
        high = before + partial;
        low = partial - (high - before);
        if low != 0.0 {
            break;
        }
    }
    // Half-way cases: the partials below decide the direction in which the tie is rounded.
    if let Some(below) = partials.last()
        && ((low < 0.0 && *below < 0.0) || (low > 0.0 && *below > 0.0))
    {
        let doubled = low * 2.0;
        let rounded = high + doubled;
        if doubled == rounded - high {
            high = rounded;
        }
    }
    high
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sum_is_compensated_as_in_cpython_3_12() {
        assert_eq!(python_sum([0.1; 10]).to_bits(), 1.0_f64.to_bits());
        assert_eq!(python_sum([1.0, 1e100, 1.0, -1e100]).to_bits(), 2.0_f64.to_bits());
        assert_eq!(python_sum([]).to_bits(), 0.0_f64.to_bits());
        assert_eq!(python_sum([-0.0]).to_bits(), 0.0_f64.to_bits(), "the start value 0 takes the sign away");
        assert_eq!(python_sum([f64::INFINITY, 1.0]).to_bits(), f64::INFINITY.to_bits());
        assert!(python_sum([f64::INFINITY, f64::NEG_INFINITY]).is_nan());
    }

    #[test]
    fn fsum_is_exact() {
        assert_eq!(python_fsum([0.1; 10]).to_bits(), 1.0_f64.to_bits());
        assert_eq!(python_fsum([1.0, 1e100, 1.0, -1e100]).to_bits(), 2.0_f64.to_bits());
        // math.fsum([1.0, 2**-53, 2**-106]): just above half-way, so it rounds up.
        let tiny = 2.0_f64.powi(-53);
        assert_eq!(python_fsum([1.0, tiny, tiny * tiny]).to_bits(), (1.0 + f64::EPSILON).to_bits());
        assert_eq!(python_fsum([1.0, tiny]).to_bits(), 1.0_f64.to_bits());
        assert_eq!(python_fsum([]).to_bits(), 0.0_f64.to_bits());
    }
}
