// A node of a CUDA graph that launches a kernel which does nothing.
#pragma once

#include <cuda_runtime_api.h>

// Records it in the capture under way on the stream.
cudaError_t capture_empty_node(cudaStream_t stream, cudaGraphNode_t* node);

// Sets its parameters, as many bytes as a decode step's copy has, in an executable of the graph.
cudaError_t set_empty_node(cudaGraphExec_t executable, cudaGraphNode_t node);
