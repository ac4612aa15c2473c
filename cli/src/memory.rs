//! How much memory a server takes, decided before any of it is allocated.

use std::path::Path;

use anyhow::ensure;
use nibble_model::checkpoint::Checkpoint;
use nibble_model::config::ModelConfig;
use nibble_model::forward::{BLOCK_SIZE, Spill, kv_block_bytes};

/// What the KV cache takes at most unless told otherwise: it is allocated at once, whoever comes.
const DEFAULT_KV_CACHE_BYTES: u64 = 4 << 30;
/// The part of the free memory that the KV cache takes at most unless told otherwise.
const DEFAULT_KV_CACHE_PART: u64 = 4;
/// What is left free on a card beside weights and KV cache: activations, logits, and the driver's own.
const CARD_RESERVE_BYTES: u64 = 2 << 30;

/// Hidden states of an evaluation that are held in memory; more of them go to a file.
const HIDDEN_STATES_BYTES: u64 = 2 << 30;

/// Where the hidden states of a model that is evaluated layer by layer go when there are many: a file without a
/// name in `directory`.
pub(crate) fn spill(directory: &Path) -> Spill {
    Spill { memory_bytes: HIDDEN_STATES_BYTES, directory: directory.to_owned() }
}

/// What the KV cache takes at most in the machine's memory, `free` bytes of it free, unless told otherwise.
pub(crate) fn host_kv_cache_bytes(free: Option<u64>) -> u64 {
    DEFAULT_KV_CACHE_BYTES.min(free.map_or(u64::MAX, |bytes| bytes / DEFAULT_KV_CACHE_PART))
}

/// What the KV cache takes at most on a card with `free` bytes, beside weights of `weights` bytes, unless told
/// otherwise.
pub(crate) fn card_kv_cache_bytes(free: u64, weights: u64) -> u64 {
    let beside = free.saturating_sub(weights).saturating_sub(CARD_RESERVE_BYTES);
    beside / 20 * 19
}

/// What a server asks for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct MemoryWishes {
    /// Bytes of the KV cache; absent: enough for all sequences, within `default_kv_cache_bytes`.
    pub(crate) kv_cache_bytes: Option<u64>,
    /// Most bytes of a KV cache that nobody asked for.
    pub(crate) default_kv_cache_bytes: u64,
    /// Bytes of a key or value on the device.
    pub(crate) cache_element_bytes: usize,
    /// The longest sequence; absent: what the model was made for, or less if the cache is smaller.
    pub(crate) max_model_len: Option<usize>,
    /// Sequences that run at once.
    pub(crate) max_num_seqs: usize,
}

/// Where the memory goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct MemoryPlan {
    pub(crate) kv_blocks: usize,
    pub(crate) kv_block_bytes: usize,
    /// The longest sequence that is accepted, prompt and completion together, in tokens.
    pub(crate) max_model_len: usize,
    /// What the model was made for, when the cache is too small for it.
    pub(crate) shortened_from: Option<usize>,
}

impl MemoryPlan {
    /// Decides the sizes.
    ///
    /// # Errors
    /// When a wish cannot be met; says how much memory it takes.
    pub(crate) fn new(config: &ModelConfig, wishes: MemoryWishes) -> anyhow::Result<Self> {
        let model_len = config.max_position_embeddings;
        let wanted_len = wishes.max_model_len.unwrap_or(model_len);
        ensure!(
            (2..=model_len).contains(&wanted_len),
            "--max-model-len is {wanted_len}, expected from 2 to {model_len}, what the model was made for"
        );
        let block_bytes = kv_block_bytes(config, wishes.cache_element_bytes);
        let blocks_of_sequence = wanted_len.div_ceil(BLOCK_SIZE);
        let blocks = match wishes.kv_cache_bytes {
            Some(bytes) => usize::try_from(bytes / block_bytes as u64)?,
            None => {
                let bytes = wishes.default_kv_cache_bytes;
                let of_all_sequences = blocks_of_sequence.saturating_mul(wishes.max_num_seqs);
                of_all_sequences.min(usize::try_from(bytes / block_bytes as u64)?)
            }
        };
        ensure!(
            blocks > 0,
            "the KV cache has no room for {BLOCK_SIZE} tokens, which take {}; raise --kv-cache-memory",
            readable(block_bytes as u64)
        );
        ensure!(
            blocks >= blocks_of_sequence || wishes.max_model_len.is_none(),
            "a sequence of --max-model-len {wanted_len} tokens takes {} of KV cache, and there are {}; \
             raise --kv-cache-memory or lower --max-model-len",
            readable((blocks_of_sequence * block_bytes) as u64),
            readable((blocks * block_bytes) as u64)
        );
        let max_model_len = wanted_len.min(blocks * BLOCK_SIZE);
        let shortened_from = (max_model_len < wanted_len).then_some(wanted_len);
        Ok(Self { kv_blocks: blocks, kv_block_bytes: block_bytes, max_model_len, shortened_from })
    }

    /// A table for the user; `head_copy_bytes` are those of an output head beside the weights, if there is one.
    pub(crate) fn table(&self, checkpoint: &Checkpoint, head_copy_bytes: u64) -> String {
        let tokens = self.kv_blocks * BLOCK_SIZE;
        let mut table =
            format!("memory   weights   {:>9}  as in the checkpoint\n", readable(checkpoint.weight_bytes()));
        if head_copy_bytes > 0 {
            let bytes = readable(head_copy_bytes);
            table +=
                &format!("         head      {bytes:>9}  the embedding table once more, in eight bits\n");
        }
        table += &format!(
            "         KV cache  {:>9}  {tokens} tokens in blocks of {BLOCK_SIZE}, {} a token\n\
             {:9}sequences of up to {} tokens",
            readable((self.kv_blocks * self.kv_block_bytes) as u64),
            readable((self.kv_block_bytes / BLOCK_SIZE) as u64),
            "",
            self.max_model_len,
        );
        if let Some(wanted) = self.shortened_from {
            table += &format!(", not {wanted} as the model allows: raise --kv-cache-memory for more");
        }
        table
    }
}

/// Free memory of the machine in bytes, as the kernel estimates it.
pub(crate) fn free_bytes() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
}

/// Parses a number of bytes: `4GiB`, `500MB`, `1.5g`, `1048576`. As usual for memory, `G` is 2^30 and `GB` too.
pub(crate) fn parse_bytes(text: &str) -> Result<u64, String> {
    let lower = text.trim().to_ascii_lowercase();
    let digits = lower.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(lower.len());
    let (number, unit) = lower.split_at(digits);
    let shift = match unit.trim() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return Err(format!("the unit of {text:?} is not known, expected KiB, MiB, GiB or TiB")),
    };
    let number: f64 = number.parse().map_err(|_| format!("{text:?} does not begin with a number"))?;
    let bytes = number * (1_u64 << shift) as f64;
    if bytes < (1_u64 << 60) as f64 { Ok(bytes as u64) } else { Err(format!("{text:?} is too large")) }
}

/// `bytes` with a unit.
pub(crate) fn readable(bytes: u64) -> String {
    const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = "B";
    for next in UNITS {
        if value < 1024.0 {
            break;
        }
        value /= 1024.0;
        unit = next;
    }
    if unit == "B" { format!("{bytes} B") } else { format!("{value:.1} {unit}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> ModelConfig {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("config.json");
        let json = r#"{"model_type": "llama", "vocab_size": 8, "hidden_size": 64, "intermediate_size": 64,
            "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 1000,
            "torch_dtype": "float32"}"#;
        std::fs::write(&path, json).unwrap();
        ModelConfig::from_file(&path).unwrap()
    }

    fn wishes() -> MemoryWishes {
        MemoryWishes {
            kv_cache_bytes: None,
            default_kv_cache_bytes: host_kv_cache_bytes(None),
            cache_element_bytes: 4,
            max_model_len: None,
            max_num_seqs: 4,
        }
    }

    /// Keys and values of 2 layers, 64 floats for each of the tokens of a block.
    const BLOCK_BYTES: usize = 2 * 2 * 64 * 4 * BLOCK_SIZE;

    #[test]
    fn a_small_model_gets_a_cache_for_all_of_its_sequences() {
        let plan = MemoryPlan::new(&config(), wishes()).unwrap();
        let kv_blocks = 4 * 1000_usize.div_ceil(BLOCK_SIZE);
        let expected =
            MemoryPlan { kv_blocks, kv_block_bytes: BLOCK_BYTES, max_model_len: 1000, shortened_from: None };
        assert_eq!(plan, expected);
    }

    #[test]
    fn little_free_memory_shortens_the_sequences_and_says_so() {
        let default_kv_cache_bytes = host_kv_cache_bytes(Some(4 * 10 * BLOCK_BYTES as u64));
        let plan = MemoryPlan::new(&config(), MemoryWishes { default_kv_cache_bytes, ..wishes() }).unwrap();
        assert_eq!(plan.kv_blocks, 10);
        assert_eq!((plan.max_model_len, plan.shortened_from), (10 * BLOCK_SIZE, Some(1000)));
    }

    #[test]
    fn a_card_gives_the_cache_what_the_weights_leave() {
        let gib = 1_u64 << 30;
        assert_eq!(card_kv_cache_bytes(80 * gib, 38 * gib), 38 * gib);
        assert_eq!(card_kv_cache_bytes(16 * gib, 38 * gib), 0);
        let of_halves = MemoryWishes { cache_element_bytes: 2, ..wishes() };
        assert_eq!(MemoryPlan::new(&config(), of_halves).unwrap().kv_block_bytes, BLOCK_BYTES / 2);
    }

    #[test]
    fn what_the_user_demands_is_met_or_refused() {
        let demand = |kv_cache_bytes, max_model_len| {
            MemoryPlan::new(&config(), MemoryWishes { kv_cache_bytes, max_model_len, ..wishes() })
        };
        assert_eq!(demand(Some(3 * BLOCK_BYTES as u64), None).unwrap().kv_blocks, 3);
        let error = demand(Some(3 * BLOCK_BYTES as u64), Some(1000)).unwrap_err().to_string();
        assert!(error.contains("raise --kv-cache-memory"), "{error}");
        assert!(demand(Some(10), None).unwrap_err().to_string().contains("no room"));
        assert!(demand(None, Some(1001)).unwrap_err().to_string().contains("made for"));
        assert!(demand(None, Some(1)).is_err());
    }

    #[test]
    fn sizes_are_read_with_units() {
        assert_eq!(parse_bytes("1048576"), Ok(1 << 20));
        assert_eq!(parse_bytes("1.5GiB"), Ok(3 << 29));
        assert_eq!(parse_bytes("500 MB"), Ok(500 << 20));
        for wrong in ["", "GiB", "1.2.3", "12 parsecs", "99999999T", "-1"] {
            assert!(parse_bytes(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn sizes_are_written_with_units() {
        assert_eq!([readable(512), readable(1536), readable(3 << 29)], ["512 B", "1.5 KiB", "1.5 GiB"]);
    }
}
