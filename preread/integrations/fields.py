"""The settings of components that are pydantic models: LangChain's and LlamaIndex's."""

from typing import Any, cast

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

from preread.channel import LOCAL_ADDRESS
from preread.integrations.ranker import OnUnscored, Ranker, Settings
from preread.values import OnMiss


class Fields(BaseModel):
    """preread.integrations.ranker.Settings as fields. A pickled copy connects again."""

    model_config = ConfigDict(arbitrary_types_allowed=True, extra="forbid")

    client: Any = Field(LOCAL_ADDRESS, description="Address, a list of equal ones, Client, AsyncClient or the like.")
    collection: str | None = Field(None, description="Collection, or alias, that passage ids refer to.")
    instruction: str | None = Field(None, description="The task in words; default: the model's.")
    compression_ratio: int | None = Field(None, description="Tokens per state; default: the server's.")
    stages: str | None = Field(None, description='A cascade in place of one ratio: "32:100, 8:20, 4".')
    on_miss: OnMiss | None = Field(None, description="For ids that are not stored; default: the server's.")
    model: str | None = Field(None, description="Served model; default: the first.")
    timeout: float | None = Field(None, description="Time limit of a request in seconds; default: the client's.")
    id_key: str | None = Field(None, description="Metadata that holds the passage id; default: the item's own id.")
    send_text: bool = Field(True, description="Send the text next to an id, for ids that are not stored.")
    on_unscored: OnUnscored = Field("raise", description="What happens where candidates cannot be scored.")
    client_options: Any = Field(None, exclude=True, repr=False, description="ClientOptions, for an address: keys, TLS.")

    _ranker: Ranker = PrivateAttr()

    def model_post_init(self, context: Any, /) -> None:
        super().model_post_init(context)
        settings = {name: getattr(self, name) for name in Settings.__optional_keys__}
        self._ranker = Ranker(self.client, **cast(Settings, settings))
