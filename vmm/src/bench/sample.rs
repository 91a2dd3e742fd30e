//! What repeated measurements say: the middle, how far they spread, and whether two differ.

use serde::{Deserialize, Serialize};

/// Times that samples are drawn anew for an interval.
const DRAWS: usize = 400;
/// Parts of the draws that lie outside the interval, on each side.
const OUTSIDE: f64 = 0.025;

/// Samples in short.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Number of samples.
    pub n: usize,
    /// Half of the samples are at most so large.
    pub median: f64,
    /// Half of the samples are at most so far from the median.
    pub spread: f64,
    /// 95 % interval of the median, by drawing from the samples anew.
    pub interval: (f64, f64),
    /// The least.
    pub min: f64,
    /// The greatest.
    pub max: f64,
}

impl Summary {
    /// Of samples; none, if there are none. `seed` is of the draws.
    pub fn of(samples: &[f64], seed: u64) -> Option<Self> {
        let mut sorted = samples.to_vec();
        sorted.sort_by(f64::total_cmp);
        let (&min, &max) = (sorted.first()?, sorted.last()?);
        let median = median(&sorted);
        let mut distances: Vec<f64> = sorted
            .iter()
            .map(|sample| (sample - median).abs())
            .collect();
        distances.sort_by(f64::total_cmp);
        let spread = self::median(&distances);
        Some(Self {
            n: sorted.len(),
            median,
            spread,
            interval: interval(&sorted, seed),
            min,
            max,
        })
    }

    /// Whether all samples are the same.
    pub fn is_exact(&self) -> bool {
        self.min == self.max
    }
}

/// The middle of sorted samples.
fn median(sorted: &[f64]) -> f64 {
    quantile(sorted, 0.5)
}

/// The value below which that part of sorted samples lies, with what lies between two in proportion. 0 of none.
pub fn quantile(sorted: &[f64], part: f64) -> f64 {
    let Some(last) = sorted.len().checked_sub(1) else {
        return 0.0;
    };
    let place = part.clamp(0.0, 1.0) * last as f64;
    let below = place.floor() as usize;
    let above = (below + 1).min(last);
    sorted[below] + (sorted[above] - sorted[below]) * (place - below as f64)
}

/// The interval in which the median of samples drawn from these lies mostly.
fn interval(sorted: &[f64], seed: u64) -> (f64, f64) {
    if sorted.first() == sorted.last() {
        return (sorted[0], sorted[0]);
    }
    let mut random = fastrand::Rng::with_seed(seed);
    let mut drawn = vec![0.0; sorted.len()];
    let mut medians: Vec<f64> = (0..DRAWS)
        .map(|_| {
            for value in &mut drawn {
                *value = sorted[random.usize(0..sorted.len())];
            }
            drawn.sort_by(f64::total_cmp);
            median(&drawn)
        })
        .collect();
    medians.sort_by(f64::total_cmp);
    (
        quantile(&medians, OUTSIDE),
        quantile(&medians, 1.0 - OUTSIDE),
    )
}

/// Whether two medians differ by more than chance and noise explain: their intervals do not meet, and they differ by
/// more than that part of the first.
pub fn differ(first: &Summary, second: &Summary, noise: f64) -> bool {
    let apart = first.interval.1 < second.interval.0 || second.interval.1 < first.interval.0;
    apart && (second.median - first.median).abs() > noise * first.median.abs()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn summary(samples: &[f64]) -> Summary {
        Summary::of(samples, 1).unwrap()
    }

    #[test]
    fn of_nothing_there_is_no_summary() {
        assert_eq!(Summary::of(&[], 1), None);
    }

    #[test]
    fn one_sample_is_exact() {
        let one = summary(&[7.0]);
        assert_eq!((one.n, one.median, one.spread), (1, 7.0, 0.0));
        assert_eq!(one.interval, (7.0, 7.0));
        assert!(one.is_exact());
    }

    #[test]
    fn an_outlier_moves_neither_median_nor_spread() {
        let calm = summary(&[10.0, 11.0, 12.0, 13.0, 14.0]);
        let wild = summary(&[10.0, 11.0, 12.0, 13.0, 1e9]);
        assert_eq!((calm.median, calm.spread), (12.0, 1.0));
        assert_eq!((wild.median, wild.spread), (12.0, 1.0));
        assert_eq!(wild.max, 1e9);
    }

    #[test]
    fn quantiles_lie_between_samples() {
        assert_eq!(quantile(&[0.0, 10.0], 0.25), 2.5);
        assert_eq!(quantile(&[1.0, 2.0, 3.0], 1.0), 3.0);
        assert_eq!(quantile(&[], 0.5), 0.0);
    }

    #[test]
    fn intervals_hold_the_median_and_repeat() {
        let samples: Vec<f64> = (0..40).map(|n| f64::from(n * n % 41)).collect();
        let first = summary(&samples);
        assert!(first.interval.0 <= first.median && first.median <= first.interval.1);
        assert!(first.interval.0 > first.min && first.interval.1 < first.max);
        assert_eq!(first, summary(&samples));
    }

    #[test]
    fn samples_of_one_kind_do_not_differ_and_slower_ones_do() {
        let base: Vec<f64> = (0..30).map(|n| 1000.0 + f64::from(n * 7 % 11)).collect();
        let again: Vec<f64> = (0..30).map(|n| 1000.0 + f64::from(n * 5 % 11)).collect();
        let slower: Vec<f64> = base.iter().map(|sample| sample * 1.1).collect();
        assert!(!differ(&summary(&base), &summary(&again), 0.0));
        assert!(differ(&summary(&base), &summary(&slower), 0.01));
        assert!(
            !differ(&summary(&base), &summary(&slower), 0.2),
            "below the noise"
        );
        assert!(
            differ(&summary(&[100.0]), &summary(&[101.0]), 0.0),
            "counts are exact"
        );
    }
}
