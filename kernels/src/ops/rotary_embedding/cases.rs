//! What every device must show: queries and keys rotated and rounded once. What lies in the cache is a device's own
//! affair; the cases of attention read it.

use super::{Args, RotaryEmbedding};
use crate::check::{Checker, random};
use crate::error::KernelError;
use crate::ops::paged_attention::{BLOCK_SIZE, cache_elements};

const POSITIONS: usize = 100;

pub(crate) fn check<D: RotaryEmbedding>(checker: &mut Checker<'_, D>) -> Result<(), KernelError> {
    for (rows, heads, kv_heads, head_dim) in
        [(1, 64, 8, 128), (33, 9, 3, 64), (200, 32, 8, 128), (5, 4, 2, 16)]
    {
        let half = head_dim / 2;
        let angle = |at: usize| (at / half) as f32 * 0.3 / (at % half + 1) as f32;
        let table = |function: fn(f32) -> f32| -> Vec<f32> {
            (0..POSITIONS * half).map(|at| function(angle(at))).collect()
        };
        let (cosines, cosine_values) = checker.input(&table(f32::cos))?;
        let (sines, sine_values) = checker.input(&table(f32::sin))?;
        let (mut query, queries) = checker.input(&random(rows * heads * head_dim, 1))?;
        let (mut key, keys) = checker.input(&random(rows * kv_heads * head_dim, 2))?;
        let (value, _) = checker.input(&random(rows * kv_heads * head_dim, 3))?;
        let positions: Vec<u32> = (0..rows as u32).map(|row| row * 37 % POSITIONS as u32).collect();
        let slots: Vec<u32> = (0..rows as u32).rev().collect();
        let blocks = rows.div_ceil(BLOCK_SIZE);
        let cache = || checker.device.cache(cache_elements(blocks, kv_heads, head_dim));
        let (mut key_cache, mut value_cache) = (cache()?, cache()?);
        checker.device.rotary_embedding(Args {
            query: &mut query,
            key: &mut key,
            value: &value,
            cosines: &cosines,
            sines: &sines,
            positions: &checker.indices(&positions)?,
            slots: &checker.indices(&slots)?,
            key_cache: &mut key_cache,
            value_cache: &mut value_cache,
            rows,
            heads,
            kv_heads,
            head_dim,
        })?;
        for (name, rotated, source, heads) in
            [("query", &query, &queries, heads), ("key", &key, &keys, kv_heads)]
        {
            let expected: Vec<f32> = (0..source.len())
                .map(|at| {
                    let (row, element) = (at / (heads * head_dim), at % head_dim);
                    let factor = positions[row] as usize * half + element % half;
                    let (cosine, sine) = (f64::from(cosine_values[factor]), f64::from(sine_values[factor]));
                    let own = f64::from(source[at]);
                    let rotated = if element < half {
                        own * cosine - f64::from(source[at + half]) * sine
                    } else {
                        own * cosine + f64::from(source[at - half]) * sine
                    };
                    rotated as f32
                })
                .collect();
            let found = checker.values(rotated, expected.len())?;
            let roundoff = checker.roundoff;
            let allowed = |expected: f32| 1.01 * roundoff * expected.abs().max(6e-5) + 3e-7;
            let case = format!("{name} {rows} x {heads} x {head_dim}");
            checker.compare("rotary_embedding", case, (&found, &expected), allowed);
        }
    }
    Ok(())
}
