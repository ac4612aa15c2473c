//! `POST /v1/embeddings`.

use std::sync::Arc;

use axum::extract::State;
use axum::{Extension, Json};
use base64::Engine;
use base64::prelude::BASE64_STANDARD;

use super::blocking;
use super::error::ApiError;
use super::fields::Fields;
use super::types::embeddings::{
    EmbeddingEntry, EmbeddingRequest, EmbeddingResponse, EmbeddingUsage, EmbeddingValues, EncodingFormat,
};
use crate::app::{AppState, seconds_since_1970};
use crate::generation::Generation;
use crate::observe::RequestIdentity;
use crate::validation::ValidRequest;

/// Embeds one or several inputs.
pub(crate) async fn embeddings(
    State(state): State<Arc<AppState>>,
    Extension(identity): Extension<RequestIdentity>,
    fields: Fields,
) -> Result<Json<EmbeddingResponse>, ApiError> {
    let request = EmbeddingRequest::try_from(fields)?;
    let hidden_size = state.model.engine.limits().hidden_size.unwrap_or(0);
    let dimensions = match request.dimensions.map(|dimensions| dimensions as usize) {
        Some(dimensions) if dimensions == 0 || dimensions > hidden_size => {
            return Err(ApiError::invalid("dimensions", dimensions, format!("from 1 to {hidden_size}")));
        }
        dimensions => dimensions.unwrap_or(hidden_size),
    };
    let format = request.encoding_format;
    let request = blocking(&state, move |state| ValidRequest::embedding(state, request)).await?;
    let generation = Generation::start(&state, &request, identity.arrived_at)?;
    let id = format!("embd-{}", request.id(&identity.id));
    let (choices, usage) = generation.collect().await?;
    let data = choices.into_iter().enumerate().map(|(index, choice)| {
        let embedding = choice.embedding.unwrap_or_default();
        EmbeddingEntry { object: "embedding", index, embedding: written(embedding, dimensions, format) }
    });
    Ok(Json(EmbeddingResponse {
        id,
        object: "list",
        created: seconds_since_1970(),
        model: state.model.name.clone(),
        data: data.collect(),
        usage: EmbeddingUsage { prompt_tokens: usage.prompt_tokens, total_tokens: usage.prompt_tokens },
    }))
}

/// The first `dimensions` numbers, scaled to length 1.
fn written(mut embedding: Vec<f32>, dimensions: usize, format: EncodingFormat) -> EmbeddingValues {
    embedding.truncate(dimensions);
    let length = embedding.iter().map(|&value| f64::from(value).powi(2)).sum::<f64>().sqrt();
    if length > 0.0 {
        embedding.iter_mut().for_each(|value| *value = (f64::from(*value) / length) as f32);
    }
    match format {
        EncodingFormat::Float => EmbeddingValues::Float(embedding),
        EncodingFormat::Base64 => {
            let bytes: Vec<u8> = embedding.iter().flat_map(|value| value.to_le_bytes()).collect();
            EmbeddingValues::Base64(BASE64_STANDARD.encode(bytes))
        }
    }
}
