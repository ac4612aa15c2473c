//! From the hidden states of a prompt to one vector for all of it.

use nibble_model::pooling_config::Pooling;

use crate::request::Request;

/// The hidden states of one prompt so far.
#[derive(Debug)]
pub(crate) struct Pool {
    pooling: Pooling,
    prompt_tokens: usize,
    /// Tokens whose hidden states are in `sum`, or were passed over.
    pooled: usize,
    sum: Vec<f64>,
}

impl Pool {
    /// For a request that wants an embedding.
    pub(crate) fn new(request: &Request) -> Option<Self> {
        let (pooling, prompt_tokens) = (request.pooling?, request.prompt.len());
        let pooled = match pooling {
            Pooling::Last => prompt_tokens - 1,
            Pooling::Mean => 0,
        };
        Some(Self { pooling, prompt_tokens, pooled, sum: Vec::new() })
    }

    /// Position of the first token whose hidden state is still wanted, as those of all after it.
    pub(crate) fn wanted_from(&self) -> usize {
        self.pooled
    }

    /// Takes the hidden states of the next tokens, `[tokens, hidden_size]`.
    pub(crate) fn add(&mut self, tokens: usize, hidden_states: &[f32]) {
        self.sum.resize(hidden_states.len() / tokens, 0.0);
        for state in hidden_states.chunks_exact(self.sum.len()) {
            self.sum.iter_mut().zip(state).for_each(|(sum, &value)| *sum += f64::from(value));
        }
        self.pooled += tokens;
    }

    /// The embedding, when all tokens were taken.
    ///
    /// # Errors
    /// When it is not made of finite numbers.
    pub(crate) fn finish(&self) -> Result<Vec<f32>, String> {
        let count = match self.pooling {
            Pooling::Last => 1,
            Pooling::Mean => self.prompt_tokens,
        };
        let embedding: Vec<f32> = self.sum.iter().map(|sum| (sum / count as f64) as f32).collect();
        if embedding.iter().all(|value| value.is_finite()) {
            return Ok(embedding);
        }
        Err("the model's hidden states are not finite, expected numbers; the weights or the KV cache may be damaged"
            .to_owned())
    }
}
