//! Which units of a model get more bits, under a budget.
//!
//! Every unit has options, each with its bits for each weight and its effect on the model's predictions. Of the
//! options of a unit only those on the lower convex hull of effect over bits are of use: from each of them, the next
//! one costs more for what it lowers. Taking steps along the hulls of all units in order of "effect lowered for each
//! bit spent", as long as they fit, lowers the sum of effects as far as any budget that a step ends at allows.

/// A way to quantize a unit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Offer {
    /// Bits stored for each weight, scales and zero points included.
    pub(crate) bits_per_weight: f64,
    /// What it does to the predictions; less is better.
    pub(crate) effect: f64,
}

/// Linear layers that are quantized alike.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Unit {
    pub(crate) weights: usize,
    /// The first is what the unit gets when nothing is spent on it.
    pub(crate) offers: Vec<Offer>,
}

/// A step along the hull of a unit.
struct Step {
    unit: usize,
    to: usize,
    /// Bits for all weights of the unit.
    bits: f64,
    /// Effect lowered for each bit.
    worth: f64,
}

/// The offer to take for each unit, so that the weights of all units take no more than `target_bits` in the mean; the
/// first offers are taken whatever they cost.
pub(crate) fn allocate(units: &[Unit], target_bits: f64) -> Vec<usize> {
    let mut chosen = vec![0; units.len()];
    let spent: f64 = units.iter().map(|unit| unit.weights as f64 * unit.offers[0].bits_per_weight).sum();
    let weights: usize = units.iter().map(|unit| unit.weights).sum();
    let mut left = target_bits * weights as f64 - spent;
    let mut steps: Vec<Step> =
        units.iter().enumerate().flat_map(|(index, unit)| steps(index, unit)).collect();
    // Stable: steps of equal worth stay in the order of the model.
    steps.sort_by(|a, b| b.worth.total_cmp(&a.worth));
    let mut stopped = vec![false; units.len()];
    for step in steps {
        if stopped[step.unit] || step.bits > left {
            stopped[step.unit] = true;
            continue;
        }
        left -= step.bits;
        chosen[step.unit] = step.to;
    }
    chosen
}

/// The steps along the lower convex hull of a unit's offers, from the first, of falling worth.
fn steps(index: usize, unit: &Unit) -> Vec<Step> {
    let mut steps = Vec::new();
    let mut from = 0;
    loop {
        let now = unit.offers[from];
        let worth =
            |offer: &Offer| (now.effect - offer.effect) / (offer.bits_per_weight - now.bits_per_weight);
        let better =
            unit.offers.iter().enumerate().filter(|(_, offer)| {
                offer.bits_per_weight > now.bits_per_weight && offer.effect < now.effect
            });
        let Some((to, offer)) = better.max_by(|a, b| worth(a.1).total_cmp(&worth(b.1))) else { break };
        let bits = (offer.bits_per_weight - now.bits_per_weight) * unit.weights as f64;
        steps.push(Step { unit: index, to, bits, worth: worth(offer) / unit.weights as f64 });
        from = to;
    }
    steps
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn offer(bits_per_weight: f64, effect: f64) -> Offer {
        Offer { bits_per_weight, effect }
    }

    fn total(units: &[Unit], chosen: &[usize], of: impl Fn(&Unit, &Offer) -> f64) -> f64 {
        units.iter().zip(chosen).map(|(unit, &choice)| of(unit, &unit.offers[choice])).sum()
    }

    #[test]
    fn the_sensitive_unit_is_paid_for_first_and_offers_off_the_hull_never() {
        let unit = |effect: f64| Unit {
            weights: 100,
            // The second is worse than a mixture of the first and the third.
            offers: vec![offer(4.0, effect), offer(5.0, 0.9 * effect), offer(6.0, 0.1 * effect)],
        };
        let units = [unit(1.0), unit(10.0), unit(2.0)];
        assert_eq!(allocate(&units, 4.0), [0, 0, 0]);
        assert_eq!(allocate(&units, 4.5), [0, 0, 0], "half of what the first step costs");
        assert_eq!(allocate(&units, 4.7), [0, 2, 0]);
        assert_eq!(allocate(&units, 5.4), [0, 2, 2]);
        assert_eq!(allocate(&units, 6.0), [2, 2, 2]);
    }

    proptest! {
        #[test]
        fn the_budget_is_kept_and_what_is_bought_is_never_worse(
            units in prop::collection::vec(
                (1usize..1000, prop::collection::vec((4.0f64..9.0, 0.0f64..1.0), 1..5)), 1..12),
            target in 3.0f64..9.0,
        ) {
            let units: Vec<Unit> = units.into_iter().map(|(weights, offers)| Unit {
                weights,
                offers: offers.into_iter().map(|(bits, effect)| offer(bits, effect)).collect(),
            }).collect();
            let chosen = allocate(&units, target);
            let bits = |unit: &Unit, offer: &Offer| offer.bits_per_weight * unit.weights as f64;
            let weights: usize = units.iter().map(|unit| unit.weights).sum();
            let nothing = vec![0; units.len()];
            let least = total(&units, &nothing, bits);
            prop_assert!(total(&units, &chosen, bits) <= (target * weights as f64).max(least) + 1e-6);
            let effect = |_: &Unit, offer: &Offer| offer.effect;
            prop_assert!(total(&units, &chosen, effect) <= total(&units, &nothing, effect));
            // With bits for everything, every unit has its best offer.
            let all = allocate(&units, 100.0);
            for (unit, choice) in units.iter().zip(all) {
                let first = unit.offers[0].bits_per_weight;
                let best = unit.offers.iter().filter(|offer| offer.bits_per_weight >= first)
                    .map(|offer| offer.effect).fold(f64::INFINITY, f64::min);
                prop_assert!(unit.offers[choice].effect <= best);
            }
        }
    }
}
