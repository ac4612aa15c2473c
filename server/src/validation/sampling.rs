//! The fields that say how to pick tokens, and when to stop.

use nibble_engine::SamplingParameters;
use nibble_model::generation_config::GenerationConfig;
use nibble_model::tokenizer::Tokenizer;

use crate::openai::error::ApiError;
use crate::openai::types::sampling::GenerationFields;

/// Most log probabilities of a position, besides the token's own.
const MAXIMUM_LOGPROBS: u32 = 20;
/// Most log probabilities of all prompts of a request together.
const MAXIMUM_PROMPT_LOGPROBS: usize = 1 << 20;
/// Most stop strings, and most bytes of one: both are looked for at each token.
const MAXIMUM_STOPS: usize = 16;
const MAXIMUM_STOP_BYTES: usize = 1024;
/// Most bad words, and most bytes of one, for the same reason.
const MAXIMUM_BAD_WORDS: usize = 256;
const MAXIMUM_BAD_WORD_BYTES: usize = 256;
/// Most that `logit_bias` may add or subtract, as OpenAI has it.
const MAXIMUM_BIAS: f32 = 100.0;

/// The sampling parameters of both endpoints: the request's, else the model's own defaults, else none. Their
/// ranges are checked by the engine.
pub(super) fn sampling(
    fields: &GenerationFields,
    of_model: &GenerationConfig,
    tokenizer: &Tokenizer,
) -> Result<SamplingParameters, ApiError> {
    let default = SamplingParameters::default();
    let top_k = match fields.top_k {
        None => of_model.top_k,
        Some(0 | -1) => None,
        Some(top_k) => Some(
            usize::try_from(top_k)
                .map_err(|_| ApiError::invalid("top_k", top_k, "at least 1, or 0 or -1 for all tokens"))?,
        ),
    };
    let logit_bias = fields
        .logit_bias
        .iter()
        .map(|(token, &bias)| {
            let id = token
                .parse()
                .map_err(|_| ApiError::invalid("logit_bias", format!("{token:?}"), "token ids"))?;
            if bias.abs() > MAXIMUM_BIAS {
                return Err(ApiError::invalid("logit_bias", bias, "numbers from -100 to 100"));
            }
            Ok((id, bias))
        })
        .collect::<Result<_, _>>()?;
    let bad_words = bad_words(&fields.bad_words, tokenizer)?;
    let is_bad = |&token: &u32| bad_words.iter().any(|word| *word == [token]);
    if fields
        .allowed_token_ids
        .as_ref()
        .is_some_and(|allowed| !allowed.is_empty() && allowed.iter().all(is_bad))
    {
        let expected = "at least one token that is not among bad_words";
        return Err(ApiError::invalid("allowed_token_ids", "nothing but bad words", expected));
    }
    Ok(SamplingParameters {
        min_tokens: fields.min_tokens.map_or(default.min_tokens, |tokens| tokens as usize),
        temperature: fields.temperature.or(of_model.temperature).unwrap_or(default.temperature),
        top_p: fields.top_p.or(of_model.top_p).unwrap_or(default.top_p),
        top_k,
        min_p: fields.min_p.or(of_model.min_p).unwrap_or(default.min_p),
        repetition_penalty: fields
            .repetition_penalty
            .or(of_model.repetition_penalty)
            .unwrap_or(default.repetition_penalty),
        frequency_penalty: fields.frequency_penalty.unwrap_or(default.frequency_penalty),
        presence_penalty: fields.presence_penalty.unwrap_or(default.presence_penalty),
        logit_bias,
        allowed_token_ids: fields.allowed_token_ids.clone(),
        bad_words,
        seed: fields.seed.map(i64::cast_unsigned),
        stop_token_ids: fields.stop_token_ids.clone(),
        ignore_eos: fields.ignore_eos,
        ..default
    })
}

/// The tokens of each word, at the beginning of a text and after a space; as vLLM has it, the latter only if the space
/// makes another first token and no more of them.
fn bad_words(words: &[String], tokenizer: &Tokenizer) -> Result<Vec<Vec<u32>>, ApiError> {
    const FIELD: &str = "bad_words";
    if words.len() > MAXIMUM_BAD_WORDS {
        let found = format!("a list of {}", words.len());
        return Err(ApiError::invalid(FIELD, found, format!("at most {MAXIMUM_BAD_WORDS} words")));
    }
    let mut sequences = Vec::new();
    for (at, word) in words.iter().enumerate() {
        let word_alone = word.trim_start();
        if word_alone.is_empty() || word.len() > MAXIMUM_BAD_WORD_BYTES {
            let expected = format!("a word of 1 to {MAXIMUM_BAD_WORD_BYTES} bytes");
            return Err(ApiError::invalid(format!("{FIELD}[{at}]"), format!("{word:?}"), expected));
        }
        let alone = tokenizer.encode(word_alone, false)?;
        let after_space = tokenizer.encode(&format!(" {word_alone}"), false)?;
        if after_space.first() != alone.first() && after_space.len() == alone.len() {
            sequences.push(after_space);
        }
        sequences.push(alone);
    }
    Ok(sequences)
}

/// A number of log probabilities.
pub(super) fn logprobs(field: &str, count: u32) -> Result<usize, ApiError> {
    if count > MAXIMUM_LOGPROBS {
        return Err(ApiError::invalid(field, count, format!("at most {MAXIMUM_LOGPROBS}")));
    }
    Ok(count as usize)
}

/// The number of log probabilities of each token of a prompt; -1 stands for the whole vocabulary.
pub(super) fn prompt_logprobs(
    fields: &GenerationFields,
    vocabulary_size: usize,
) -> Result<Option<usize>, ApiError> {
    const FIELD: &str = "prompt_logprobs";
    let Some(count) = fields.prompt_logprobs else { return Ok(None) };
    if fields.stream {
        return Err(ApiError::invalid(FIELD, "given beside stream", "stream to be false beside it"));
    }
    match u32::try_from(count) {
        Ok(count) => logprobs(FIELD, count).map(Some),
        Err(_) if count == -1 => Ok(Some(vocabulary_size)),
        Err(_) => Err(ApiError::invalid(FIELD, count, "at least 0, or -1 for the whole vocabulary")),
    }
}

/// Refuses more log probabilities of prompts than fit into an answer: `count` of each of `tokens`.
pub(super) fn check_prompt_logprobs(count: Option<usize>, tokens: usize) -> Result<(), ApiError> {
    let entries = count.map_or(0, |count| count.saturating_add(1).saturating_mul(tokens));
    if entries <= MAXIMUM_PROMPT_LOGPROBS {
        return Ok(());
    }
    let found = format!("given for {tokens} tokens, which makes {entries} log probabilities");
    let expected = format!("at most {MAXIMUM_PROMPT_LOGPROBS} in all; ask for fewer, or for fewer tokens");
    Err(ApiError::invalid("prompt_logprobs", found, expected))
}

/// The strings that end an answer.
pub(super) fn stop_strings(stops: Vec<String>) -> Result<Vec<String>, ApiError> {
    if stops.len() > MAXIMUM_STOPS {
        return Err(ApiError::invalid(
            "stop",
            format!("{} strings", stops.len()),
            format!("at most {MAXIMUM_STOPS}"),
        ));
    }
    match stops.iter().find(|stop| stop.is_empty() || stop.len() > MAXIMUM_STOP_BYTES) {
        Some(stop) => {
            let expected = format!("strings of 1 to {MAXIMUM_STOP_BYTES} bytes");
            Err(ApiError::invalid("stop", format!("a string of {} bytes", stop.len()), expected))
        }
        None => Ok(stops),
    }
}
