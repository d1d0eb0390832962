// Calls of the clients for JavaScript: client, base URL, model and the arguments as JSON; prints the answer, or the error.
const [client, url, model, given] = process.argv.slice(2);
const { query, documents, ...more } = JSON.parse(given);

const calls = {
  voyage: async () => {
    const { VoyageAIClient } = require("voyageai");
    const voyage = new VoyageAIClient({ apiKey: "anything", environment: url });
    const answer = await voyage.rerank({ query, documents, model, ...more }, { maxRetries: 0 });
    return answer.data.map((one) => [one.index, one.relevanceScore, one.document ?? null]);
  },
  pinecone: async () => {
    const { Pinecone } = require("@pinecone-database/pinecone");
    const pinecone = new Pinecone({ apiKey: "anything", controllerHostUrl: url, maxRetries: 0 });
    const answer = await pinecone.inference.rerank({ model, query, documents, ...more });
    return answer.data.map((one) => [one.index, one.score, one.document ?? null]);
  },
};

calls[client]()
  .then((results) => ({ results }))
  .catch((error) => ({ error: String(error) }))
  .then((answer) => console.log(JSON.stringify(answer)));
