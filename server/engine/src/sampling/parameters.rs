//! How a request wants its tokens picked, with the names, ranges and defaults of vLLM's `SamplingParams`.

/// How to pick tokens and when to stop. [`SamplingParameters::default`] changes nothing about the model's
/// distribution and generates 16 tokens.
#[derive(Clone, Debug, PartialEq)]
pub struct SamplingParameters {
    /// Most tokens to generate; 0 only with `prompt_logprobs`, when nothing else is wanted.
    pub max_tokens: usize,
    /// End-of-sequence and stop tokens are not sampled before this many tokens were generated.
    pub min_tokens: usize,
    /// Divides the logits, at least 0; 0 takes the most likely token (the lowest id among equals).
    pub temperature: f32,
    /// Sample from the smallest set of most likely tokens whose probabilities reach this sum, in (0, 1].
    pub top_p: f32,
    /// Sample from this many most likely tokens; all if absent.
    pub top_k: Option<usize>,
    /// Leave out tokens less likely than this times the most likely one, in [0, 1].
    pub min_p: f32,
    /// Above 1 makes tokens that occur in the prompt or the completion less likely: their logits are divided
    /// by it where positive and multiplied where negative (CTRL, arXiv 1909.05858). Above 0; 1 is off.
    pub repetition_penalty: f32,
    /// Subtracted from a logit once for each time the token occurs in the completion.
    pub frequency_penalty: f32,
    /// Subtracted from the logit of each token that occurs in the completion.
    pub presence_penalty: f32,
    /// Added to the logits of single tokens before anything else.
    pub logit_bias: Vec<(u32, f32)>,
    /// Sample only these tokens; all if absent.
    pub allowed_token_ids: Option<Vec<u32>>,
    /// Words as sequences of tokens, none of them empty: the last token of one is never sampled where the others are
    /// the end of the completion.
    pub bad_words: Vec<Vec<u32>>,
    /// Makes the completion reproducible; the engine picks one if absent.
    pub seed: Option<u64>,
    /// Tokens that end the sequence, besides the model's end-of-sequence tokens.
    pub stop_token_ids: Vec<u32>,
    /// Treat the model's end-of-sequence tokens as ordinary tokens.
    pub ignore_eos: bool,
    /// Report the log probability of each token, and of this many most likely tokens.
    pub logprobs: Option<usize>,
    /// Report the log probability of each token of the prompt but the first, and of this many most likely tokens in
    /// its place.
    pub prompt_logprobs: Option<usize>,
}

impl Default for SamplingParameters {
    fn default() -> Self {
        Self {
            max_tokens: 16,
            min_tokens: 0,
            temperature: 1.0,
            top_p: 1.0,
            top_k: None,
            min_p: 0.0,
            repetition_penalty: 1.0,
            frequency_penalty: 0.0,
            presence_penalty: 0.0,
            logit_bias: Vec::new(),
            allowed_token_ids: None,
            bad_words: Vec::new(),
            seed: None,
            stop_token_ids: Vec::new(),
            ignore_eos: false,
            logprobs: None,
            prompt_logprobs: None,
        }
    }
}

/// A parameter is outside its range.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{parameter} is {found}, expected {expected}")]
pub struct InvalidParameter {
    /// Name of the parameter, as in the API.
    pub parameter: &'static str,
    /// What was given.
    pub found: String,
    /// What is allowed.
    pub expected: String,
}

/// The log probability of one token under the model's own distribution: before bias, penalties,
/// temperature and filters.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct TokenLogprob {
    /// The token.
    pub token_id: u32,
    /// Natural logarithm of its probability.
    pub logprob: f32,
}

/// Log probabilities at one position of a sequence.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprobs {
    /// Natural logarithm of the probability of the token that is there under the model's own distribution.
    pub logprob: f32,
    /// Place of that token in the order of all tokens, from 1: most likely first, the lower id first among equals.
    pub rank: usize,
    /// The most likely tokens, as many as asked for, most likely first (the lower id first among equals).
    pub top: Vec<TokenLogprob>,
}

impl SamplingParameters {
    /// Checks every parameter against its range.
    ///
    /// # Errors
    /// The first parameter outside its range: a number that is not finite, a token id that is not below
    /// `vocabulary_size`, `max_tokens` or `top_k` of 0, an empty list of allowed tokens or an empty bad word, or a value outside the range in its description.
    pub fn check(&self, vocabulary_size: usize) -> Result<(), InvalidParameter> {
        if self.prompt_logprobs.is_none() {
            at_least_one("max_tokens", self.max_tokens)?;
        }
        at_least_one("top_k", self.top_k.unwrap_or(1))?;
        in_range("temperature", self.temperature, self.temperature >= 0.0, "a number of at least 0")?;
        in_range("top_p", self.top_p, self.top_p > 0.0 && self.top_p <= 1.0, "above 0 and at most 1")?;
        in_range("min_p", self.min_p, (0.0..=1.0).contains(&self.min_p), "from 0 to 1")?;
        let penalty = self.repetition_penalty;
        in_range("repetition_penalty", penalty, penalty > 0.0, "a number above 0")?;
        in_range("frequency_penalty", self.frequency_penalty, true, "a finite number")?;
        in_range("presence_penalty", self.presence_penalty, true, "a finite number")?;
        for &(token_id, bias) in &self.logit_bias {
            in_vocabulary("logit_bias", token_id, vocabulary_size)?;
            in_range("logit_bias", bias, true, "finite numbers")?;
        }
        let allowed = self.allowed_token_ids.as_deref();
        not_empty("allowed_token_ids", allowed.is_some_and(<[u32]>::is_empty))?;
        for (parameter, token_ids) in
            [("stop_token_ids", &self.stop_token_ids[..]), ("allowed_token_ids", allowed.unwrap_or_default())]
        {
            token_ids.iter().try_for_each(|&token_id| in_vocabulary(parameter, token_id, vocabulary_size))?;
        }
        for word in &self.bad_words {
            not_empty("bad_words", word.is_empty())?;
            word.iter().try_for_each(|&token_id| in_vocabulary("bad_words", token_id, vocabulary_size))?;
        }
        for (parameter, count) in [("logprobs", self.logprobs), ("prompt_logprobs", self.prompt_logprobs)] {
            if let Some(count) = count.filter(|&count| count > vocabulary_size) {
                let expected = format!("at most the vocabulary size, {vocabulary_size}");
                return Err(InvalidParameter { parameter, found: count.to_string(), expected });
            }
        }
        Ok(())
    }
}

/// Refuses a token id outside the vocabulary.
pub(crate) fn in_vocabulary(
    parameter: &'static str,
    token_id: u32,
    vocabulary_size: usize,
) -> Result<(), InvalidParameter> {
    if (token_id as usize) < vocabulary_size {
        return Ok(());
    }
    Err(InvalidParameter {
        parameter,
        found: format!("token id {token_id}"),
        expected: format!("token ids below the vocabulary size, {vocabulary_size}"),
    })
}

fn at_least_one(parameter: &'static str, value: usize) -> Result<(), InvalidParameter> {
    if value >= 1 {
        return Ok(());
    }
    Err(InvalidParameter { parameter, found: value.to_string(), expected: "at least 1".to_owned() })
}

fn not_empty(parameter: &'static str, is_empty: bool) -> Result<(), InvalidParameter> {
    if !is_empty {
        return Ok(());
    }
    Err(InvalidParameter { parameter, found: "empty".to_owned(), expected: "at least one token".to_owned() })
}

fn in_range(
    parameter: &'static str,
    value: f32,
    inside: bool,
    expected: &str,
) -> Result<(), InvalidParameter> {
    if inside && value.is_finite() {
        return Ok(());
    }
    Err(InvalidParameter { parameter, found: value.to_string(), expected: expected.to_owned() })
}
