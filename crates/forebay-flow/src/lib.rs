//! Flow<Stage>, trait Stage and the reply stream: how a request passes from layer to layer.
